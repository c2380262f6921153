"""Wanda against norms taken by hand, layer by layer."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_structopt.pruning import Magnitude, Unstructured, prune
from lightning_structopt.pruning.calibration import Calibration
from lightning_structopt.pruning.criteria import Evidence
from lightning_structopt.pruning.wanda import Wanda


def scores(module: nn.Module, batches: Any, *names: str) -> dict[str, Tensor]:
    weights = {name: module.get_parameter(name).detach() for name in names}
    return dict(Wanda(Calibration(batches)).score(weights, Evidence(module)).values)


def energy_by_output(layer: nn.Module, batches: list[Tensor]) -> Tensor:
    """The oracle: how much energy each weight alone puts into the outputs, found by running it alone."""
    energy = torch.zeros_like(layer.weight)
    alone = copy.deepcopy(layer)
    alone.bias = None
    with torch.no_grad():
        for place in torch.ones_like(layer.weight).nonzero().tolist():
            alone.weight.zero_()
            alone.weight[tuple(place)] = layer.weight[tuple(place)]
            energy[tuple(place)] = sum(alone(batch).square().sum() for batch in batches)
    return energy.sqrt()


IMAGES = [(3, 4, 7, 6), (2, 4, 5, 5)]
LAYERS: dict[str, tuple[nn.Module, list[tuple[int, ...]]]] = {
    "linear": (nn.Linear(4, 3), [(5, 4), (2, 4)]),
    "linear on sequences": (nn.Linear(4, 3), [(5, 7, 4), (2, 3, 4)]),
    "linear on one sample": (nn.Linear(4, 3), [(4,)]),
    "conv": (nn.Conv2d(4, 3, 3), IMAGES),
    "conv on one sample": (nn.Conv2d(4, 3, 3), [(4, 6, 6)]),
    "conv, padded": (nn.Conv2d(4, 3, 3, padding=1), IMAGES),
    "conv, oblong": (nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), IMAGES),
    "conv, same": (nn.Conv2d(4, 2, 4, padding="same"), IMAGES),
    "conv, valid": (nn.Conv2d(4, 2, 2, padding="valid"), IMAGES),
    "conv, circular": (nn.Conv2d(4, 2, 3, padding=2, padding_mode="circular"), IMAGES),
    "conv, reflected": (nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect", stride=2), IMAGES),
    "conv, groups": (nn.Conv2d(4, 6, 3, groups=2, stride=2), IMAGES),
    "conv, depthwise": (nn.Conv2d(4, 4, 3, groups=4), IMAGES),
    "conv, depthwise twice": (nn.Conv2d(4, 8, 3, groups=4), IMAGES),
    "conv 1d": (nn.Conv1d(4, 3, 3, padding=1, stride=2), [(2, 4, 8)]),
    "conv 3d": (nn.Conv3d(2, 3, 2, dilation=2), [(2, 2, 4, 3, 5)]),
    "transposed": (nn.ConvTranspose2d(4, 3, 3, stride=2), IMAGES),
    "transposed, groups": (nn.ConvTranspose2d(4, 6, 2, groups=2), IMAGES),
    "transposed 1d on one sample": (nn.ConvTranspose1d(4, 3, 2), [(4, 6)]),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("layer", "shapes"), LAYERS.values(), ids=LAYERS)
def test_a_weight_scores_what_it_alone_puts_out(layer: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    batches = [torch.randn(shape) for shape in shapes]
    found = scores(nn.Sequential(layer), batches, "0.weight")["0.weight"]
    torch.testing.assert_close(found, energy_by_output(layer, batches).detach())


def test_it_is_the_formula_for_a_linear_layer() -> None:
    layer, inputs = nn.Linear(3, 2), torch.randn(6, 3)
    found = scores(layer, inputs, "weight")["weight"]
    expected = [
        [abs(w) * inputs[:, j].norm().item() for j, w in enumerate(row)] for row in layer.weight.tolist()
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(3, 2, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.pair(input1=inputs[:, :3], input2=inputs[:, 3:])


def test_bilinear_layers_and_inputs_by_keyword() -> None:
    module, inputs = TwoInputs(), torch.randn(6, 5)
    found = scores(module, inputs, "pair.weight")["pair.weight"]
    products = torch.einsum("ni,nj->nij", inputs[:, :3], inputs[:, 3:]).square().sum(0).sqrt()
    torch.testing.assert_close(found, module.pair.weight.detach().abs() * products)


def test_each_layer_sees_its_own_inputs_and_a_shared_one_sees_all() -> None:
    shared = nn.Linear(3, 3)
    tied = nn.Linear(3, 3)
    tied.weight = shared.weight
    module = nn.Sequential(shared, nn.ReLU(), shared, nn.Tanh(), tied, nn.Linear(3, 2))
    inputs = torch.randn(6, 3)
    found = scores(module, inputs, "0.weight", "5.weight")
    seen = [inputs]
    for layer in module:
        seen.append(layer(seen[-1]).detach())
    squares = seen[0].square().sum(0) + seen[2].square().sum(0) + seen[4].square().sum(0)
    torch.testing.assert_close(found["0.weight"], shared.weight.detach().abs() * squares.sqrt())
    torch.testing.assert_close(found["5.weight"], module[5].weight.detach().abs() * seen[5].norm(dim=0))


def test_a_frozen_transformer_takes_no_short_cut_around_its_layers() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)

        def forward(self, inputs: Tensor) -> Tensor:
            padding = torch.tensor([[False, False, True]] * len(inputs))
            return self.encoder(inputs, src_key_padding_mask=padding)

    module, name = Padded().requires_grad_(False), "encoder.layers.0.linear1.weight"
    frozen = scores(module, inputs := torch.randn(2, 3, 4), name)[name]
    torch.testing.assert_close(frozen, scores(module.requires_grad_(True), inputs, name)[name])


def test_half_precision_does_not_overflow() -> None:
    layer = nn.Linear(3, 2).half()
    found = scores(layer, torch.full((4, 3), 1000.0).half(), "weight")["weight"]
    torch.testing.assert_close(found, layer.weight.detach().float().abs() * 2000)


def test_rows_compared_by_wanda_differ_from_rows_by_magnitude() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[1.0, 2.0]])
    inputs = torch.tensor([[10.0, 1.0]])
    by_size = Unstructured().choose(
        Magnitude().score({"w": layer.weight.detach()}), {"w": torch.ones(1, 2) > 0}, 0.5
    )
    assert by_size["w"].tolist() == [[False, True]]
    assert prune(layer, 0.5, criterion=Wanda(Calibration(inputs)))["weight"].tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("module", "name", "kind"),
    [
        (nn.LSTM(3, 2), "weight_ih_l0", "LSTM"),
        (nn.GRUCell(3, 2), "weight_ih", "GRUCell"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", "MultiheadAttention"),
        (nn.TransformerEncoderLayer(4, 2, 8), "self_attn.in_proj_weight", "MultiheadAttention"),
        (nn.Sequential(nn.Embedding(5, 4)), "0.weight", "Embedding"),
    ],
)
def test_layers_that_hide_their_inputs_are_refused_before_training(module, name: str, kind: str) -> None:
    parameters = dict(module.named_parameters())
    with pytest.raises(ValueError, match=f"Found `{name}` of a `{kind}`. Give `exclude = "):
        Wanda().require(module, parameters)
    with pytest.raises(ValueError, match="needs layers that show their inputs"):
        Wanda(Calibration(torch.ones(1, 3))).score({name: parameters[name]}, Evidence(module))


def test_all_of_them_are_named_at_once() -> None:
    module = nn.TransformerEncoderLayer(4, 2, 8)
    weights = {name: p for name, p in module.named_parameters() if p.ndim > 1}
    hidden = r"\['self_attn.in_proj_weight', 'self_attn.out_proj.weight'\]"
    with pytest.raises(ValueError, match=f"Give `exclude = {hidden}`"):
        Wanda().require(module, weights)


def test_a_layer_that_never_runs_is_an_error() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    module.add_module("spare", nn.Linear(3, 3))
    module.forward = lambda inputs: module[0](inputs)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="Found none of `spare.weight`"):
        prune(module, 0.5, criterion=Wanda(Calibration(torch.randn(2, 3))))
    with pytest.raises(ValueError, match="Found none of `0.weight`.*or give a `calibration`"):
        prune(module, 0.5, criterion=Wanda())


def compiled(kind: str) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    if kind == "wrapped":
        return torch.compile(module, backend="eager")
    part = module if kind == "itself" else module[0]
    part.compile(backend="eager")
    return module


@pytest.mark.parametrize("kind", ["wrapped", "itself", "a part"])
def test_compiled_modules_are_refused_in_training_and_calibrated_without(kind: str) -> None:
    module, inputs = compiled(kind), torch.randn(5, 3)
    module(inputs)  # compiles, so that hooks come too late
    weights = {name: p for name, p in module.named_parameters() if p.ndim > 1}
    with pytest.raises(ValueError, match="is compiled by `torch.compile`. Give a `calibration`"):
        Wanda().require(module, weights)
    Wanda(Calibration(inputs)).require(module, weights)
    first = next(iter(weights))
    found = scores(module, inputs, first)[first]
    torch.testing.assert_close(found, weights[first].detach().abs() * inputs.norm(dim=0))
