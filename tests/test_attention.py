"""Attention with low-rank projections is nn.MultiheadAttention at full rank, however it is called."""

import copy
import itertools

import pytest
import torch
import torchvision
from torch import nn

import dlrt

pytestmark = pytest.mark.usefixtures("float64")


def attention(**options):
    made = nn.MultiheadAttention(8, 2, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)  # torch begins with biases of zero
    return made


def both(packed):
    return packed, dlrt.to_low_rank(copy.deepcopy(packed))


def assert_same(result, expected):
    for y, expected_y in zip(result, expected, strict=True):
        assert (y is None) == (expected_y is None)
        assert y is None or (y.shape == expected_y.shape and torch.allclose(y, expected_y, atol=1e-12))


MASKS = {
    "none": {},
    "causal": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True},
    "added": {"attn_mask": torch.linspace(-2, 2, 25, dtype=torch.float64).view(5, 5)},
    "of every head": {"attn_mask": (torch.arange(150) % 7 == 3).view(6, 5, 5)},
    "padding": {"key_padding_mask": (torch.arange(15) % 5 > 2).view(3, 5)},
    "padding and causal": {
        "attn_mask": torch.ones(5, 5).triu(1).bool(),
        "key_padding_mask": torch.zeros(3, 5).index_fill(1, torch.tensor([4]), 1).bool(),
        "is_causal": True,
    },
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_at_full_rank_it_is_the_packed_one_whatever_the_masks(masks):
    ways = itertools.product((True, False), repeat=4)
    for batch_first, need_weights, average, bias in ways:
        packed, low_rank = both(attention(batch_first=batch_first, bias=bias))
        assert isinstance(low_rank, dlrt.Attention)
        assert list(dlrt.compression(low_rank).ranks) == ["q_proj", "k_proj", "v_proj", "out_proj"]
        q, k, v = (torch.randn(3, 5, 8) for _ in range(3))
        if not batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        options = {**masks, "need_weights": need_weights, "average_attn_weights": average}
        assert_same(low_rank(q, k, v, **options), packed(q, k, v, **options))


def test_keys_and_values_of_other_widths_and_lengths_and_inputs_without_a_batch():
    packed, low_rank = both(attention(kdim=6, vdim=4, batch_first=True))
    for q, k, v in (
        (torch.randn(3, 5, 8), torch.randn(3, 7, 6), torch.randn(3, 7, 4)),
        (torch.randn(5, 8), torch.randn(7, 6), torch.randn(7, 4)),
    ):
        for need_weights in (True, False):
            options = {"need_weights": need_weights, "key_padding_mask": torch.arange(7) > 4}
            if q.dim() == 3:
                options["key_padding_mask"] = options["key_padding_mask"].expand(3, 7)
            assert_same(low_rank(q, k, v, **options), packed(q, k, v, **options))


def test_dropout_is_that_of_training_alone():
    _, low_rank = both(attention(dropout=0.5))
    x = torch.randn(5, 3, 8)
    for options in ({"need_weights": True}, {"need_weights": False}):
        outputs = [low_rank.train(mode)(x, x, x, **options)[0] for mode in (True, True, False, False)]
        assert not torch.allclose(outputs[0], outputs[1])
        assert torch.equal(outputs[2], outputs[3])


def test_a_step_at_full_rank_is_that_of_the_dense_weights():
    packed, low_rank = both(attention(kdim=6, vdim=4))
    q, k, v = torch.randn(5, 3, 8), torch.randn(7, 3, 6), torch.randn(7, 3, 4)
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizers = [
        torch.optim.SGD(packed.parameters(), **settings),
        dlrt.DLRT(low_rank, torch.optim.SGD, tau=0.0, **settings),
    ]
    for _ in range(3):
        for model, optimizer in zip((packed, low_rank), optimizers, strict=True):
            optimizer.zero_grad()
            model(q, k, v, need_weights=False)[0].square().mean().backward()
            optimizer.step()
    for name, parameter in dlrt.to_dense(low_rank).named_parameters():
        assert torch.allclose(parameter, packed.get_parameter(name), atol=1e-10)


def test_it_goes_back_and_its_state_dicts_load_both_ways():
    for options in ({}, {"kdim": 6, "vdim": 4}, {"bias": False, "batch_first": True}):
        packed = attention(**options)
        state = packed.state_dict()
        low_rank = dlrt.to_low_rank(attention(**options), rank=2)
        low_rank.load_state_dict(state)  # of a dense one: full rank
        again = dlrt.load_factors(attention(**options), low_rank.state_dict())
        assert isinstance(again, dlrt.Attention)
        for made in (low_rank, again):
            back = dlrt.to_dense(made)
            assert back is made
            assert str(back) == str(packed)
            assert all(torch.allclose(back.state_dict()[name], state[name], atol=1e-12) for name in state)
            assert list(back.state_dict()) == list(state)


def test_frozen_parts_mode_and_type_stay():
    packed = attention().float().eval()
    packed.in_proj_weight.requires_grad_(False)
    low_rank = dlrt.to_low_rank(packed, rank=2)
    assert not low_rank.q_proj.S.requires_grad
    assert low_rank.q_proj.bias.requires_grad
    assert not any(module.training for module in low_rank.modules())
    assert {p.dtype for p in low_rank.parameters()} == {torch.float32}
    back = dlrt.to_dense(low_rank)
    assert [name for name, p in back.named_parameters() if not p.requires_grad] == ["in_proj_weight"]


@pytest.mark.parametrize("frozen", ["q_proj", "k_proj", "v_proj"])
def test_of_weights_that_are_not_packed_each_is_frozen_for_itself(frozen):
    packed = attention(kdim=6, vdim=4)
    getattr(packed, f"{frozen}_weight").requires_grad_(False)
    low_rank = dlrt.to_low_rank(packed, rank=2)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert getattr(low_rank, name).S.requires_grad == (name != frozen)
    back = dlrt.to_dense(low_rank)
    assert [name for name, p in back.named_parameters() if not p.requires_grad] == [f"{frozen}_weight"]


def test_what_is_skipped_or_refused_stays_packed():
    model = nn.ModuleDict({"one": attention(), "two": attention()})
    state = model["one"].state_dict()
    dlrt.to_low_rank(model, rank=2, skip=["one", "two.out_proj"])
    assert type(model["one"]) is nn.MultiheadAttention
    assert all(torch.equal(value, state[name]) for name, value in model["one"].state_dict().items())
    assert list(dlrt.compression(model).ranks) == [f"two.{name}_proj" for name in "qkv"]
    other = nn.ModuleDict({"one": attention()})
    with pytest.raises(ValueError, match="compression must be at most"):
        dlrt.to_low_rank(other, compression=0.99)
    assert type(other["one"]) is nn.MultiheadAttention
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.warns(UserWarning, match="stays dense: attention with add_bias_kv or add_zero_attn"):
            assert type(dlrt.to_low_rank(attention(**options))) is nn.MultiheadAttention
    packed = attention()
    packed.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="stays dense: it has hooks"):
        assert type(dlrt.to_low_rank(packed)) is nn.MultiheadAttention


def test_wrong_calls_are_told():
    low_rank = dlrt.to_low_rank(attention(batch_first=True), rank=2)
    x = torch.randn(3, 5, 8)
    with pytest.raises(RuntimeError, match="is_causal must come with the attn_mask"):
        low_rank(x, x, x, is_causal=True)
    nested = torch.nested.as_nested_tensor([x[0], x[1, :3]])
    with pytest.raises(TypeError, match="must get padded tensors, got nested ones"):
        low_rank(nested, nested, nested)


def transformer():
    return nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_torchs_transformer_computes_the_same_in_every_mode_also_exported(rank):
    dense = transformer()
    low_rank = dlrt.to_low_rank(copy.deepcopy(dense), rank=rank)
    assert sum(isinstance(module, dlrt.Attention) for module in low_rank.modules()) == 6
    first = dense if rank is None else low_rank
    others = (low_rank, dlrt.export(low_rank), dlrt.to_dense(copy.deepcopy(low_rank)))
    x, y = torch.randn(3, 6, 8), torch.randn(3, 4, 8)
    padding = torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [3]])
    masks = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(4), "tgt_is_causal": True}
    masks |= {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    for training, grad in itertools.product((True, False), repeat=2):
        with torch.set_grad_enabled(grad):
            expected = first.train(training)(x, y, **masks)
            for model in others:
                assert torch.allclose(model.train(training)(x, y, **masks), expected, atol=1e-12)


def test_in_evaluation_an_encoder_multiplies_by_the_low_rank_weights():
    """And not on the fast path of torch, by dense ones that training has left behind."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    dlrt.to_low_rank(encoder, rank=2).eval()
    x = torch.randn(3, 6, 8)
    with torch.no_grad():
        before = encoder(x)
        encoder.layers[0].self_attn.v_proj.S.mul_(2)
        assert not torch.allclose(encoder(x), before)
        padding = torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [3]])
        masked = encoder(x, src_key_padding_mask=padding)
        assert torch.allclose(masked[1, :4], encoder(x[1:2, :4])[0], atol=1e-12)
    assert not encoder.use_nested_tensor
    assert dlrt.to_dense(encoder).use_nested_tensor


@pytest.mark.parametrize(
    ("masks", "told"),
    [
        ({"attn_mask": torch.ones(5, 5, dtype=torch.int64)}, "attn_mask must be of bool"),
        ({"key_padding_mask": torch.ones(2, 5, dtype=torch.uint8)}, "key_padding_mask must be of bool"),
        ({"attn_mask": torch.zeros(1, 5)}, r"shape \(5, 5\) or \(8, 5, 5\), got \(1, 5\)"),
        ({"attn_mask": torch.zeros(2, 5, 5)}, r"shape \(5, 5\) or \(8, 5, 5\), got \(2, 5, 5\)"),
        ({"key_padding_mask": torch.zeros(2, 1)}, r"shape \(2, 5\), got \(2, 1\)"),
        ({"key_padding_mask": torch.zeros(5)}, r"shape \(2, 5\), got \(5,\)"),
    ],
)
def test_masks_that_the_packed_one_refuses_are_refused(masks, told):
    packed, x = nn.MultiheadAttention(8, 4, batch_first=True), torch.randn(2, 5, 8)
    with pytest.raises((AssertionError, RuntimeError)):
        packed(x, x, x, **masks)
    with pytest.raises((TypeError, ValueError), match=told):
        dlrt.to_low_rank(packed)(x, x, x, **masks)


def test_it_has_the_attributes_of_the_packed_one():
    packed = nn.MultiheadAttention(8, 2)
    own = {name for name in vars(packed) if not name.startswith("_")} | set(packed._parameters)
    attention = dlrt.Attention(nn.MultiheadAttention(8, 2))
    assert not [name for name in own if not hasattr(attention, name)]


def vit_b_16():
    """Torchvision's vit_b_16 with blocks of the same kind, fewer and narrower."""
    sizes = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2}
    model = torchvision.models.VisionTransformer(**sizes, hidden_dim=16, mlp_dim=32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # torchvision begins with zeros there
    return model


def swin_t():
    """Torchvision's swin_t likewise; its attention reads the weights of its linear layers."""
    sizes = {
        "patch_size": [4, 4],
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": [4, 4],
    }
    return torchvision.models.SwinTransformer(**sizes, num_classes=5, stochastic_depth_prob=0.0)


@pytest.mark.parametrize(("make", "layers"), [(vit_b_16, 14), (swin_t, 19)])
def test_vision_transformers_convert_as_a_whole_train_and_go_back(make, layers):
    model, x = make(), torch.randn(4, 3, 32, 32)
    expected = model(x)
    dlrt.to_low_rank(model)
    assert len(dlrt.compression(model).ranks) == layers
    assert torch.allclose(model(x), expected, atol=1e-10)
    settings = {"lr": 0.05, "update": "muon", "compression": 0.5, "ramp": 4, "allot_every": 1}
    optimizer = dlrt.DLRT(model, torch.optim.SGD, **settings)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), torch.arange(4)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert dlrt.compression(model).evaluation_compression >= 50
    expected = model.eval()(x)
    again = dlrt.load_factors(make(), model.state_dict()).eval()
    assert torch.equal(again(x), expected)
    assert torch.allclose(dlrt.to_dense(again)(x), expected, atol=1e-10)
    assert str(again) == str(make().eval())


def test_torch_export_takes_an_exported_transformer_with_any_number_of_samples():
    model, x = dlrt.to_low_rank(vit_b_16(), rank=4).eval(), torch.randn(4, 3, 32, 32)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(dlrt.export(model), (x,), dynamic_shapes=dynamic).module()
    for size in (1, 3):
        assert torch.allclose(program(x[:size]), model(x[:size]), atol=1e-12)
