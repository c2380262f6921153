"""`widen`: more channels, the same function, in evaluation and in training."""

import copy
from typing import Any

import pytest
import torch
from small_nets import Tied
from torch import Tensor, nn
from torchvision import models

from lightning_structopt.growth import Widen, widen
from lightning_structopt.growth.copies import copied_indices, multiplicities
from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.tracing import Origin


def assert_same_function(one: nn.Module, other: nn.Module, *inputs: Tensor) -> None:
    """Compare outputs in double precision, in evaluation and in training without dropout."""
    for training in (False, True):
        outputs = []
        for module in (one, other):
            copied = copy.deepcopy(module).double().train(training)
            for part in copied.modules():
                if "Drop" in type(part).__name__:
                    part.eval()
            with torch.no_grad():
                outputs.append(
                    copied(*(each.double() if each.is_floating_point() else each for each in inputs))
                )
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *between, nn.ReLU(), nn.Linear(6, 3))


def test_is_net2wider_by_hand() -> None:
    module, inputs = mlp(), torch.randn(5, 4)
    wide = widen(module, "0", 2.0, inputs)
    twice = torch.arange(6).repeat_interleave(2)
    assert torch.equal(wide[0].weight, module[0].weight[twice])
    assert torch.equal(wide[0].bias, module[0].bias[twice])
    assert torch.equal(wide[2].weight, module[2].weight[:, twice] / 2)
    assert torch.equal(wide[2].bias, module[2].bias)


def test_a_broken_factor_divides_each_by_its_own_count() -> None:
    module, inputs = mlp(), torch.randn(5, 4)
    wide = widen(module, "0", 1.5, inputs)
    assert wide[0].out_features == wide[2].in_features == 9
    for column in module[2].weight.T:
        share = [count for count in (1, 2) if any(torch.equal(c, column / count) for c in wide[2].weight.T)]
        assert len(share) == 1
    sums = torch.stack([
        sum(w for w, r in zip(wide[2].weight.T, wide[0].weight, strict=True) if torch.equal(r, row))
        for row in module[0].weight
    ])  # fmt: skip
    torch.testing.assert_close(sums, module[2].weight.T)


def test_statistics_of_batch_norm_are_copied() -> None:
    module, inputs = mlp(nn.BatchNorm1d(6)), torch.randn(5, 4)
    module(inputs)
    wide = widen(module, "0", 3.0, inputs)
    three = torch.arange(6).repeat_interleave(3)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(wide[1], name), getattr(module[1], name)[three])
    assert wide[1].num_features == 18
    assert wide[1].num_batches_tracked == module[1].num_batches_tracked == 1


def test_leaves_the_module_as_it_is() -> None:
    module = mlp(nn.BatchNorm1d(6)).train()
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    wide = widen(module, "0", 2.0, torch.randn(5, 4, generator=torch.Generator()), noise=0.5)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert wide.training


class TestNoise:
    def test_adds_up_to_nothing(self) -> None:
        module, inputs = mlp(), torch.randn(5, 4)
        plain, noisy = (widen(module, "0", 2.0, inputs, noise=noise, seed=4) for noise in (0.0, 0.3))
        difference = (noisy[2].weight - plain[2].weight).reshape(3, 6, 2)
        assert difference.abs().max() > 0.01
        torch.testing.assert_close(difference.sum(-1), torch.zeros(3, 6), rtol=0, atol=1e-6)
        assert torch.equal(noisy[0].weight, plain[0].weight)
        assert_same_function(module, noisy, inputs)

    def test_is_relative_to_the_weights(self) -> None:
        module = nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 50))
        inputs = torch.randn(5, 4)
        plain, noisy = (widen(module, "0", 2.0, inputs, noise=noise) for noise in (0.0, 0.2))
        # Of two copies one has the noise and the other its negative: half the variance is left.
        expected = 0.2 * plain[2].weight.std() / 2**0.5
        torch.testing.assert_close((noisy[2].weight - plain[2].weight).std(), expected, rtol=0.02, atol=0)

    def test_tells_copies_apart(self) -> None:
        module, inputs = mlp(), torch.randn(64, 4)
        for noise in (0.0, 0.3):
            wide = widen(module, "0", 2.0, inputs, noise=noise)
            optimizer = torch.optim.SGD(wide.parameters(), 0.1)
            wide(inputs).square().sum().backward()
            optimizer.step()
            rows = wide[0].weight.reshape(6, 2, 4)
            assert torch.equal(rows[:, 0], rows[:, 1]) == (noise == 0)

    def test_depends_on_the_seed_alone(self) -> None:
        module, inputs = mlp(), torch.randn(5, 4)
        weights = [widen(module, "0", 1.5, inputs, 0.3, seed=seed)[2].weight for seed in (0, 0, 1)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


def test_copies_are_even_to_one() -> None:
    often = multiplicities(7, 2.4, torch.Generator())
    assert often.sum() == 17
    assert set(often.tolist()) == {2, 3}


def test_what_belongs_to_one_member_is_copied_as_a_whole() -> None:
    heads = torch.tensor([[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]])
    group = ChannelGroup(
        "w", {("w", 0): heads}, torch.tensor([5, 6, 7]), torch.zeros(3, dtype=torch.bool), False
    )
    copies = copied_indices([Origin("w", 0, 1, 13)], [(group, torch.tensor([1, 2, 1]))])
    assert copies == {"w": {0: [0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 8, 9, 8, 9, 10, 11, 12]}}


class TestNormalization:
    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
    def test_is_exact_where_all_is_copied_equally_often(self, norm: Any) -> None:
        module, inputs = mlp(norm(6)), torch.randn(5, 4)
        wide = widen(module, "0", 2.0, inputs)
        assert wide[1].normalized_shape == (12,)
        assert_same_function(module, wide, inputs)

    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
    def test_is_refused_where_not(self, norm: Any) -> None:
        with pytest.raises(
            ValueError,
            match=r"the group of `0.weight` \(6\) is under a layer, .* `factor = 1.5` is not whole",
        ):
            widen(mlp(norm(6)), "0", 1.5, torch.randn(5, 4))

    def test_groups_are_copied_as_a_whole(self) -> None:
        module, inputs = mlp(nn.GroupNorm(3, 6)), torch.randn(5, 4)
        wide = widen(module, "0", 5 / 3, inputs)
        assert (wide[1].num_groups, wide[1].num_channels) == (5, 10)
        assert_same_function(module, wide, inputs)


class TestBadInput:
    @pytest.mark.parametrize("factor", [0.5, 1, -2.0, float("nan"), float("inf")])
    def test_factor(self, factor: float) -> None:
        with pytest.raises(ValueError, match=r"`factor` must be in \(1, inf\). Found `factor = "):
            widen(mlp(), "0", factor, torch.randn(5, 4))

    def test_factor_of_another_kind(self) -> None:
        with pytest.raises(TypeError, match="`factor` must be a number. Found `factor = '2'`"):
            widen(mlp(), "0", "2", torch.randn(5, 4))

    def test_noise(self) -> None:
        with pytest.raises(ValueError, match=r"`noise` must be in \[0, inf\). Found `noise = -1`"):
            widen(mlp(), "0", 2.0, torch.randn(5, 4), noise=-1)

    def test_a_factor_that_adds_nothing(self) -> None:
        with pytest.raises(
            ValueError, match="`factor` must add a channel. Found that 6 of `0.weight`, times 1.05"
        ):
            widen(mlp(), "0", 1.05, torch.randn(5, 4))

    def test_unknown_name(self) -> None:
        module = nn.Sequential()
        module.add_module("stem", nn.Linear(4, 6))
        module.add_module("head", nn.Linear(6, 3))
        with pytest.raises(ValueError, match="Found `name = 'steam'`. Near it: 'stem'"):
            widen(module, "steam", 2.0, torch.randn(5, 4))

    def test_an_output(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"the group of `2.weight\[0\]`, `2.bias\[0\]` is held by the output. Name a layer",
        ):
            widen(mlp(), "2", 2.0, torch.randn(5, 4))

    def test_a_block_without_channels_of_its_own(self) -> None:
        with pytest.raises(
            ValueError, match="A block grows in the channels that are within it alone. Found none in `1`"
        ):
            widen(mlp(), "1", 2.0, torch.randn(5, 4))

    def test_a_tied_embedding(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, tokens: Tensor) -> Tensor:
                return self.head(self.embed(tokens))

        module = Tied()
        before = module.embed.weight.clone()
        with pytest.raises(
            ValueError, match=r"changes outputs by .* a weight both makes and reads these channels"
        ):
            widen(module, "embed", 2.0, torch.randint(11, (2, 5)))
        assert torch.equal(module.embed.weight, before)

    def test_two_activations(self) -> None:
        class Similarity(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.query, self.key, self.value = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1) @ self.value(x)

        with pytest.raises(
            ValueError, match="read by no weight: two activations, one made by `(query|key).weight`"
        ):
            widen(Similarity(), "key", 2.0, torch.randn(2, 5, 4))

    def test_sizes_in_code(self) -> None:
        class HardCoded(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.stem(x).view(-1, 6))

        with pytest.raises(
            ValueError, match="widening `stem.weight` does not run, as sizes are written into code"
        ):
            widen(HardCoded(), "stem", 2.0, torch.randn(5, 4))

    def test_a_branch_on_data(self) -> None:
        class Branch(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.stem(x) if x.sum() > 0 else x.sum())

        with pytest.raises(ValueError, match="that `torch.export` can trace"):
            widen(Branch(), "stem", 2.0, torch.randn(5, 4))


def test_a_block_grows_in_what_is_within_it() -> None:
    torch.manual_seed(0)
    module = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    inputs = torch.randn(2, 3, 32, 32)
    wide = widen(module, "layer2.0", 2.0, inputs)
    assert (wide.layer2[0].conv1.out_channels, wide.layer2[0].bn1.num_features) == (256, 256)
    assert wide.layer2[0].conv2.out_channels == 128
    assert_same_function(module, wide, inputs)


def test_of_two_parts_that_together_fit_only_one_is_left_out() -> None:
    """Features of a tied embedding can't grow; the rest of the module does."""
    module, tokens = Tied(), torch.randint(11, (2, 5))
    wide = Widen(2.0).apply(module, tokens)
    assert wide.embed.embedding_dim == 8
    assert wide.hidden.out_features == 32
    assert_same_function(module, wide, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    module = mlp(nn.BatchNorm1d(6)).to(dtype)
    wide = widen(module, "0", 1.5, torch.randn(5, 4, dtype=dtype), noise=0.1)
    assert {each.dtype for each in wide.parameters()} == {dtype}
    inputs = torch.randn(50, 4, dtype=dtype)
    torch.testing.assert_close(wide.eval()(inputs), module.eval()(inputs), rtol=3e-2, atol=3e-2)


def test_memory_format_stays() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(
        memory_format=torch.channels_last
    )
    wide = widen(module, "0", 2.0, torch.randn(2, 3, 8, 8))
    assert wide[2].weight.is_contiguous(memory_format=torch.channels_last)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.attention, self.head = (
            nn.Linear(8, 16),
            nn.MultiheadAttention(16, 4, batch_first=True),
            nn.Linear(16, 3),
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(tokens)
        return self.head(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0])


@pytest.mark.parametrize("name", ["attention", "inner"])
def test_torchs_attention_says_why_it_does_not_grow(name: str) -> None:
    message = "`nn.MultiheadAttention`, here `attention`, wants as many features of its heads"
    with pytest.raises(ValueError, match=message):
        widen(Attends(), name, 2.0, torch.randn(2, 5, 8))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(images)
        return self.head((hidden + self.body(hidden)).mean((2, 3)))


def test_a_stem_names_the_layer_that_grows() -> None:
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"Found none in `stem`: .* Name a layer, .*: `stem.0`\.$"):
        widen(Residual(), "stem", 2.0, images)
    assert widen(Residual(), "stem.0", 2.0, images).body.out_channels == 16


class TestWeightNorm:
    def test_what_makes_channels_grows(self) -> None:
        norm = nn.utils.parametrizations.weight_norm
        module = nn.Sequential(norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2))
        inputs = torch.randn(4, 6)
        wide = widen(module, "0", 1.5, inputs)
        assert wide[0].weight.shape == (12, 6)
        torch.testing.assert_close(wide(inputs), module(inputs))

    def test_what_reads_them_is_said_to_hold_them(self) -> None:
        norm = nn.utils.parametrizations.weight_norm
        module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), norm(nn.Linear(8, 2)))
        with pytest.raises(ValueError, match="`2` reads these channels under a weight norm"):
            widen(module, "0", 2.0, torch.randn(4, 6))

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_the_old_one_is_refused(self) -> None:
        module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.utils.weight_norm(nn.Linear(8, 2)))
        with pytest.raises(ValueError, match="old `nn.utils.weight_norm` makes. Found it on `2`"):
            widen(module, "0", 2.0, torch.randn(4, 6))
