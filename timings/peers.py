"""Low-rank layers of other libraries, of fixed rank: what `step.py --peers` times beside DLRT.

pip install peft tensorly-torch
"""

from copy import deepcopy

from peft import LoraConfig, inject_adapter_in_model
from tltorch import FactorizedConv
from torch import nn

from dlrt import compression
from dlrt.ranks import parameters


def lora(dense: nn.Module, low: nn.Module) -> nn.Module:
    """The network with frozen weights and, beside them, B A of the low-rank one's ranks; all else trains."""
    ranks = compression(low).ranks
    model = inject_adapter_in_model(
        LoraConfig(target_modules=list(ranks), rank_pattern=ranks, bias="all"), deepcopy(dense)
    )
    for name, module in model.named_modules():
        if not any(name == own or name.startswith(f"{own}.") for own in ranks):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = True
    return model


def tucker(dense: nn.Module, low: nn.Module) -> nn.Module:
    """The network with kernels in Tucker form, each of about as many parameters as in the low-rank one."""
    model = deepcopy(dense)
    for name, rank in compression(low).ranks.items():
        shape = low.get_submodule(name).shape
        share = parameters(rank, shape) / (shape[0] * shape[1])
        kernel = model.get_submodule(name)
        factorized = FactorizedConv.from_conv(
            kernel, rank=share, factorization="tucker", implementation="factorized", decompose_weights=False
        )
        model.set_submodule(name, factorized)
    return model


PEERS = {"mlp": lora, "resnet20": tucker}  # by network
