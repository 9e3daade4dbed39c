"""The loops of others train low-rank networks with a DLRT; each is tried where it is installed."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import dlrt

SETTINGS = {"lr": 0.02, "update": "muon", "update_lr": 0.1, "compression": 0.4, "ramp": 8, "allot_every": 4}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def data():
    torch.manual_seed(1)
    y = torch.arange(64) % 4
    return list(zip(torch.randn(4, 16)[y] + 0.3 * torch.randn(64, 16), y, strict=True))


def loss_of(model):
    x, y = (torch.stack(parts) for parts in zip(*data(), strict=True))
    return cross_entropy(model(x), y).item()


def assert_trained(model):
    assert loss_of(model) < loss_of(network()) / 2
    assert dlrt.compression(model).evaluation_compression >= 40


def test_the_trainer_of_transformers_takes_it_with_a_schedule(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = dlrt.to_low_rank(network())

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = model

        def forward(self, x, labels):
            logits = self.network(x)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    optimizer = dlrt.DLRT(model, torch.optim.AdamW, **SETTINGS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=32)
    options = {
        "per_device_train_batch_size": 16,
        "num_train_epochs": 8,
        "max_grad_norm": 1.0,
        "use_cpu": True,
    }
    trainer = transformers.Trainer(
        Classifier(),
        transformers.TrainingArguments(tmp_path, report_to=[], save_steps=16, disable_tqdm=True, **options),
        train_dataset=[{"x": x, "labels": y} for x, y in data()],
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    assert_trained(model)
    assert schedule.get_last_lr()[-1] == pytest.approx(0.002)
    assert list(tmp_path.glob("checkpoint-16/optimizer.pt"))


def test_a_loop_of_accelerate_trains_with_it(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = dlrt.to_low_rank(network())
    optimizer = dlrt.DLRT(model, torch.optim.SGD, momentum=0.9, **SETTINGS)
    loader = torch.utils.data.DataLoader(data(), batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(8):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert_trained(accelerator.unwrap_model(model))


def test_lightning_trains_with_it_and_goes_on_from_its_checkpoint(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = dlrt.to_low_rank(network())

        def training_step(self, batch, _):
            x, y = batch
            return cross_entropy(self.network(x), y)

        def configure_optimizers(self):
            return dlrt.DLRT(self.network, torch.optim.SGD, momentum=0.9, **SETTINGS)

    def trained(epochs, start=None):
        torch.manual_seed(0)
        model = Classifier()
        off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path, **off)
        trainer.fit(model, torch.utils.data.DataLoader(data(), batch_size=16), ckpt_path=start)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model.network

    model = trained(8)
    assert_trained(model)
    trained(4)
    again = trained(8, tmp_path / "4.ckpt")
    assert all(torch.allclose(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))


def tokens():
    return {"input_ids": torch.randint(0, 50, (2, 9))}


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)), tokens(), 13


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), tokens(), 8


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)), tokens(), 15


def timm_vit():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**sizes), {"x": torch.randn(2, 3, 32, 32)}, 10


@pytest.mark.filterwarnings("ignore:.*head stays dense")
@pytest.mark.parametrize(("make", "name"), [(gpt2, "c_attn"), (timm_vit, "qkv")])
def test_packed_projections_of_other_libraries_are_three_blocks(make, name):
    model, inputs, layers = make()
    state = model.eval().state_dict()
    before = model(**inputs)
    expected = before if isinstance(before, torch.Tensor) else before[0]
    dlrt.to_low_rank(model, split={name: 3})
    assert len(dlrt.compression(model).ranks) == layers + 2 * 2  # three for one, in two blocks of the network
    for _ in range(2):
        after = model(**inputs)
        assert torch.allclose(after if isinstance(after, torch.Tensor) else after[0], expected, atol=1e-4)
        model.load_state_dict(state)
    assert dlrt.to_dense(model).state_dict().keys() == state.keys()


@pytest.mark.filterwarnings("ignore:.*stays dense")
@pytest.mark.parametrize("make", [bert, llama, timm_vit, gpt2])
def test_models_of_other_libraries_compute_the_same_at_full_rank_and_take_adapters(make):
    model, inputs, layers = make()
    model.eval()

    def outputs():
        y = model(**inputs)
        return y if isinstance(y, torch.Tensor) else y[0]

    expected = outputs()
    dlrt.to_low_rank(model)
    assert len(dlrt.compression(model).ranks) == layers
    assert torch.allclose(outputs(), expected, atol=1e-4)
    dlrt.to_dense(model)
    dlrt.add_adapters(model, rank=2)
    assert sum("adapter.S" in name for name in dlrt.adapter_state(model)) >= layers
    assert torch.allclose(outputs(), expected, atol=1e-4)
    optimizer = dlrt.DLRT(model, torch.optim.AdamW, lr=0.01, update="muon", tau=0.0)
    outputs().square().mean().backward()
    optimizer.step()
    changed = outputs()
    assert not torch.allclose(changed, expected, atol=1e-3)
    assert torch.allclose((dlrt.merge_adapters(model), outputs())[1], changed, atol=1e-4)
