"""Class-activation maps of dense and low-rank networks, made with the package grad-cam.

A low-rank layer is an ordinary module, so the package explains such networks as it stands. Here is what it
leaves to its user: targets that are never dropped, maps before their scaling, a network that stays as it
was, pictures of any kind, and measures by which the maps of two networks are compared.
"""

from dlrt.cams.explain import Maps, check_options, explain
from dlrt.cams.methods import CLASSLESS, METHODS
from dlrt.cams.spatial import default_layer, spatial_layers

__all__ = ["CLASSLESS", "METHODS", "Maps", "check_options", "default_layer", "explain", "spatial_layers"]
