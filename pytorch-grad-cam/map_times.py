"""How long a map takes at each share of the full rank, against the dense network, in one process.

    python pytorch-grad-cam/map_times.py --arch ResNet20 --weights random

Half a minute on two CPU cores. Medians of maps made in turn; all that a call does is counted, prediction and
map. Sixteen pictures of 32 x 32 at a time, fewer of larger ones.
"""

from __future__ import annotations

from dlrt import errors
from dlrt.cams import network_flags
from dlrt.cams.map_times import map_times
from dlrt.errors import RunError
from dlrt.flags import NATURAL, HelpFormatter, Parser, number


@errors.boundary(code=errors.STOPPED)
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    network_flags.add_flags(parser)
    add = parser.add_argument
    share = number(float, "(0, 1]")
    add("--shares", type=share, nargs="+", default=[1.0, 0.5, 0.25, 0.125], help="of the full rank")
    add("--sizes", type=NATURAL, nargs="+", default=[32, 224], help="pixels a side")
    add("--repeats", type=NATURAL, default=15, help="timed maps of each network")
    args = parser.parse_args()
    try:
        network = network_flags.read(args)
        layer = network_flags.target_layer(network, None, args.method)
        map_times(network, layer, args.method, args.shares, args.sizes, args.repeats)
    except (RunError, ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
