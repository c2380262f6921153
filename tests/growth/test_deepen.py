"""`deepen`: one more layer, the same function, or an error that says why not; and plans as files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_widen import assert_same_function
from torch import Tensor, nn

from lightning_structopt.growth import Deepen, GrowthPlan, Widen, deepen


class Functional(nn.Module):
    """Activations as functions, as many write them."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.norm(self.stem(x))).mean((2, 3)))


IMAGES = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(2))


def mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 3))


def test_is_net2deeper_by_hand() -> None:
    deep = deepen(mlp(nn.ReLU()), "1", torch.randn(2, 4))
    layer, activation = deep[1][1]
    assert torch.equal(layer.weight, torch.eye(6))
    assert torch.equal(layer.bias, torch.zeros(6))
    assert isinstance(activation, nn.ReLU)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_convolution_gives_back_its_input(size: int) -> None:
    deep = deepen(Functional(torch.relu), "norm", IMAGES, kernel_size=size)
    activation, layer = deep.norm[1]
    assert isinstance(activation, nn.ReLU)  # before the layer, as another one follows
    assert layer.weight.shape == (4, 4, size, size)
    assert torch.equal(layer(IMAGES.repeat(1, 2, 1, 1)), IMAGES.repeat(1, 2, 1, 1))


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(), nn.Hardtanh(-0.5, 2.0)],
    ids=repr,
)
@pytest.mark.parametrize("after", ["0", "1"])
def test_activations_that_leave_their_results_as_they_are(activation: nn.Module, after: str) -> None:
    module, inputs = mlp(activation), 3 * torch.randn(50, 4)
    assert_same_function(module, deepen(module, after, inputs), inputs)


@pytest.mark.parametrize("name", ["GELU", "Tanh", "Sigmoid", "SiLU", "LeakyReLU", "ELU"])
@pytest.mark.parametrize("after", ["0", "1", "2"])
def test_a_residual_block_fits_anywhere(name: str, after: str) -> None:
    module, inputs = mlp(getattr(nn, name)()), torch.randn(50, 4)
    deep = deepen(module, after, inputs, kind="residual", norm=True, seed=3)
    assert_same_function(module, deep, inputs)
    deep(inputs).square().sum().backward()
    assert all(each.grad is not None for each in deep.parameters())


def test_tokens_get_a_linear_layer() -> None:
    module, tokens = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(2, 5, 8)
    deep = deepen(module, "1", tokens, kind="residual")
    assert deep[1][1].body[0].weight.shape == (8, 8)
    assert_same_function(module, deep, tokens)


def test_a_plain_sequence_gets_one_more_part() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 3))
    deep = deepen(module, "0", torch.randn(2, 4))
    assert module.state_dict().keys() < deep.state_dict().keys()
    assert len(deep[0]) == 3


def test_any_other_place_becomes_a_sequence() -> None:
    module = Functional(torch.relu)
    deep = deepen(module, "norm", IMAGES)
    assert isinstance(deep.norm[0], nn.BatchNorm2d)
    assert_same_function(module, deep, IMAGES)
    again = deepen(deep, "norm", IMAGES)
    assert len(again.norm) == 3
    assert_same_function(module, again, IMAGES)


def test_what_got_deeper_gets_wider() -> None:
    module, inputs = mlp(nn.ReLU()), torch.randn(5, 4)
    deep = Deepen().apply(module, inputs)
    wide = Widen(1.5).apply(deep, inputs)
    assert (wide[0].out_features, wide[1][1][0].out_features, wide[2].in_features) == (9, 9, 9)
    assert_same_function(module, wide, inputs)


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "operator"), [("GELU", "gelu"), ("Tanh", "tanh"), ("LeakyReLU", "leaky_relu")]
    )
    def test_activation(self, name: str, operator: str) -> None:
        with pytest.raises(
            ValueError, match=f'Found the activation `{operator}` at `1`. Give `kind="residual"`'
        ):
            deepen(mlp(getattr(nn, name)()), "1", torch.randn(2, 4))

    def test_no_activation(self) -> None:
        with pytest.raises(ValueError, match="Found `mean` and .* name the layer right before a ReLU"):
            deepen(Pooled(), "stem", IMAGES)

    def test_unknown_name(self) -> None:
        with pytest.raises(
            ValueError,
            match="`after` must be the name of a submodule. Found `after = 'steam'`. Near it: 'stem'",
        ):
            deepen(Functional(torch.relu), "steam", IMAGES)

    def test_a_part_that_does_not_run(self) -> None:
        module = Functional(torch.relu)
        module.spare = nn.Linear(3, 3)
        with pytest.raises(
            ValueError, match="Found `after = 'spare'`, which does not. Such parts are 'stem', 'norm', 'head'"
        ):
            deepen(module, "spare", IMAGES)

    def test_the_whole_module(self) -> None:
        with pytest.raises(ValueError, match="Found the whole module, a `Functional`. Name one of its parts"):
            deepen(Functional(torch.relu), "", IMAGES, kind="residual")

    def test_a_part_that_is_asked_for_more(self) -> None:
        module = nn.MultiheadAttention(8, 2, batch_first=True)
        x = torch.randn(2, 5, 8)
        with pytest.raises(ValueError, match="which does not. Such parts are"):
            deepen(module, "out_proj", (x, x, x), kind="residual")

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (
                {"kernel_size": 4},
                "`kernel_size` must be odd, so that an image keeps its size. Found `kernel_size = 4`",
            ),
            ({"kernel_size": 0}, "`kernel_size` must be at least 1"),
            ({"kind": "dense"}, "`kind` must be 'identity' or 'residual'. Found `kind = 'dense'`"),
            ({"norm": True}, "A batch norm can't give back its input in training and in evaluation at once"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            deepen(Functional(torch.relu), "norm", IMAGES, **arguments)

    def test_a_batch_norm_of_tokens(self) -> None:
        module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        with pytest.raises(
            ValueError, match=r"A batch norm takes vectors or images. Found .* \[2, 5, 8\] at `1`"
        ):
            deepen(module, "1", torch.randn(2, 5, 8), kind="residual", norm=True)


class Pooled(nn.Module):
    """Nothing but a mean follows its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean((2, 3)))


class TestPlans:
    def plan(self) -> GrowthPlan:
        module, inputs = mlp(nn.ReLU6()), torch.randn(5, 4)
        first = Widen(1.5, "0").plan(module, inputs)
        return first.then(Deepen().plan(first.apply(module), inputs))

    def test_are_files(self, tmp_path: Path) -> None:
        plan = self.plan()
        plan.save(tmp_path / "plan.json")
        assert GrowthPlan.load(tmp_path / "plan.json") == plan

    def test_keep_the_function_of_any_weights(self, tmp_path: Path) -> None:
        fresh = mlp(nn.ReLU6())
        assert_same_function(fresh, self.plan().apply(fresh), torch.randn(9, 4))

    def test_make_the_same_everywhere(self) -> None:
        fresh, plan = mlp(nn.ReLU6()), self.plan()
        one, other = (plan.apply(fresh).state_dict() for _ in range(2))
        assert all(torch.equal(value, other[name]) for name, value in one.items())

    def test_of_another_class(self) -> None:
        with pytest.raises(
            ValueError, match="A plan fits the class that it was made for, `torch.nn.*Sequential`"
        ):
            self.plan().apply(nn.Linear(4, 6))

    def test_twice(self) -> None:
        with pytest.raises(ValueError, match="A widening fits modules of the sizes that it was made for"):
            self.plan().apply(self.plan().apply(mlp(nn.ReLU6())))

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("no", "A plan is a JSON file. Found"),
            ("[]", "reads plans of version 1. Found version None"),
            ('{"version": 2}', "Found version 2"),
            ('{"version": 1, "module_class": "x"}', "A plan has `module_class` and `steps`. Found KeyError"),
            ('{"version": 1, "module_class": "x", "steps": [{"step": "jump"}]}', "Found KeyError"),
        ],
        ids=["text", "list", "version", "fields", "step"],
    )
    def test_of_files_that_are_none(self, text: str, match: str, tmp_path: Path) -> None:
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            GrowthPlan.load(tmp_path / "plan.json")
