"""What goes together, against what can be counted by hand."""

import re

import pytest
import torch
from small_nets import make
from torch import Tensor, nn

from lightning_structopt.shrinking.channels import channel_report
from lightning_structopt.shrinking.components import connected_components
from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.removal import remove
from lightning_structopt.shrinking.structure import Structure, structure_of
from lightning_structopt.shrinking.targets import ChannelRatio

NOTHING = torch.empty(0, dtype=torch.int64)


def slots(structure: Structure) -> list[tuple[int, set[tuple[str, int]]]]:
    return [(group.size, set(group.slots)) for group in structure.found.groups]


def members(group: ChannelGroup, name: str, dim: int) -> list[list[int]]:
    return group.slots[name, dim].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_components_are_those_of_a_search(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(60, (2, 45), generator=generator)
    expected = list(range(60))
    for _ in range(60):
        for one, other in edges.T.tolist():
            expected[one] = expected[other] = min(expected[one], expected[other])
    assert connected_components(60, list(edges.split(9, 1))).tolist() == expected


def test_layers_of_a_perceptron() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    (found,) = slots(structure_of(module, torch.randn(3, 4)))
    norm = {("1.weight", 0), ("1.bias", 0), ("1.running_mean", 0), ("1.running_var", 0)}
    assert found == (8, {("0.weight", 0), ("0.bias", 0), ("3.weight", 1)} | norm)


def test_a_channel_is_all_its_places_once_it_is_flat() -> None:
    group = structure_of(*make("flattened")).found.groups[0]
    assert members(group, "3.weight", 1) == [
        list(range(9 * channel, 9 * channel + 9)) for channel in range(6)
    ]


def test_heads_go_as_wholes() -> None:
    (group,) = structure_of(*make("heads")).groups(include_normalized=False)
    rows = [[12 * part + 3 * head + index for part in range(3) for index in range(3)] for head in range(4)]
    assert members(group, "qkv.weight", 0) == rows
    assert members(group, "out.weight", 1) == [[3 * head + index for index in range(3)] for head in range(4)]


def test_heads_that_are_turned_by_a_table_go_as_wholes() -> None:
    (group,) = structure_of(*make("rotary")).groups(include_normalized=False)
    assert members(group, "out.weight", 1) == [list(range(4 * head, 4 * head + 4)) for head in range(4)]


def test_what_code_picks_by_its_number_stays() -> None:
    (group,) = structure_of(*make("gates")).found.groups
    assert members(group, "stem.weight", 0) == [[each] for each in range(6)]


def test_heads_that_share_a_key_go_together() -> None:
    (group,) = structure_of(*make("grouped_queries")).found.groups
    assert group.size == 2
    assert members(group, "q.weight", 0) == [list(range(6)), list(range(6, 12))]


def test_a_shuffle_takes_the_same_column_of_every_row() -> None:
    groups = structure_of(*make("shuffle")).found.groups
    assert members(groups[0], "one.weight", 0) == [[each, each + 3, each + 6, each + 9] for each in range(3)]
    assert members(groups[1], "other.weight", 0) == [[each, each + 6] for each in range(6)]


def test_chunks_stay_equal_though_each_goes_its_own_way() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.other = nn.Linear(4, 8), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.stem(x).chunk(2, -1)
            return self.one(one) + self.other(other)

    (group,) = structure_of(Apart(), torch.randn(3, 4)).found.groups
    assert members(group, "stem.weight", 0) == [[each, each + 4] for each in range(4)]


def test_pixels_of_a_shuffle_go_together() -> None:
    groups = structure_of(*make("pixel_shuffle")).found.groups
    assert members(groups[0], "0.weight", 0) == [list(range(4 * each, 4 * each + 4)) for each in range(4)]
    assert members(groups[0], "3.weight", 1) == [[0], [1], [2], [3]]
    assert not any(("4.weight", 0) in group.slots for group in groups)  # the output


def test_depthwise_goes_with_its_channel() -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 2, 1))
    (group,) = structure_of(module, torch.randn(2, 3, 8, 8)).found.groups
    assert members(group, "0.weight", 0) == [[each] for each in range(6)]
    assert members(group, "2.weight", 1) == [[2 * each, 2 * each + 1] for each in range(6)]


def test_hidden_units_of_all_gates_layers_and_directions_go_together() -> None:
    groups = {group.name: group for group in structure_of(*make("lstm")).found.groups}
    group = groups["cells.weight_ih_l0"]
    assert members(group, "cells.weight_hh_l1_reverse", 0)[2] == [2, 10, 18, 26]
    assert members(group, "cells.weight_ih_l1", 1)[2] == [2, 10]
    assert members(group, "head.weight", 1)[2] == [2, 10]
    assert set(groups["stem.weight"].slots) > {("cells.weight_ih_l0", 1), ("cells.weight_ih_l0_reverse", 1)}


@pytest.mark.parametrize(
    ("name", "marked"), [("layer_norm", True), ("rms_norm", True), ("batch_norm", False)]
)
def test_a_norm_over_features_marks_them(name: str, marked: bool) -> None:
    groups = structure_of(*make(name)).found.groups
    assert [group.normalized for group in groups] == [marked, False]


def test_whole_groups_of_a_group_norm_go() -> None:
    first = structure_of(*make("group_norm")).found.groups[0]
    assert not first.normalized
    assert members(first, "0.weight", 0) == [[0, 1], [2, 3], [4, 5], [6, 7]]


class _Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x).renorm(2, 1, 5.0)).relu())


def test_an_unknown_operator_keeps_what_enters_it_and_is_told() -> None:
    structure = structure_of(_Renormed(), torch.randn(3, 4))
    assert slots(structure) == [(6, {("two.weight", 0), ("two.bias", 0), ("three.weight", 1)})]
    assert dict(structure.traced.unknown) == {"renorm": ""}
    told = remove(structure, NOTHING).explain()
    assert "`renorm` (in ``) has no rule" in told
    assert "Kept because of `renorm`, an operator without a rule: one.weight[0] (8)" in told


class _Strided(_Renormed):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x).as_strided((len(x), 8), (8, 1))).relu())


class _Rolled(_Renormed):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x).roll(1, 1)).relu())


class _Permuted(_Renormed):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x)[:, [3, 1, 0, 2, 7, 6, 5, 4]]).relu())


class _Windowed(_Renormed):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x).unfold(1, 8, 8)[:, 0]).relu())


@pytest.mark.parametrize("kind", [_Strided, _Rolled, _Permuted, _Windowed])
def test_what_is_counted_in_elements_stays_whole(kind: type[nn.Module]) -> None:
    module, inputs = kind(), torch.randn(3, 4)
    report = channel_report(module, ChannelRatio(0.5), inputs)
    assert report.plan.kept.keys() == {"two.weight", "two.bias", "three.weight"}
    assert report.difference < 1e-5


class _Streams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        return self.back(self.inner(x).relu()) + x, x


def test_what_reaches_the_output_stays() -> None:
    structure = structure_of(_Streams(), torch.randn(3, 4))
    (found,) = slots(structure)
    assert found == (6, {("inner.weight", 0), ("inner.bias", 0), ("back.weight", 1)})
    assert re.search(
        r"Kept because of the output: .*stem.weight\[0\] \(8\)", remove(structure, NOTHING).explain()
    )
    with pytest.raises(ValueError, match=r"Found none, because of .*the output \(`weight\[0\]`\)"):
        channel_report(nn.Linear(4, 3), ChannelRatio(0.5), torch.randn(2, 4))


def test_reasons_name_the_operator_and_the_output() -> None:
    told = remove(structure_of(*make("flattened")), NOTHING).explain()
    assert "Kept because of `conv2d` in `0`: " in told
    assert "0.weight[1] (3)" in told
    assert "Kept because of the output: 3.weight[0] (4)" in told


def test_excluded_parameters_keep_their_shapes() -> None:
    module, inputs = make("resnet")
    structure = structure_of(module, inputs, exclude=["layer1.*", "fc.weight"])
    for group in structure.found.groups:
        assert not any(name.startswith(("layer1.", "fc.weight")) for name, _ in group.slots)
    assert structure.found.groups
    with pytest.raises(
        ValueError, match="No parameter matches `exclude = 'layer9.*'`. Parameters start with: 'bn1'"
    ):
        structure_of(module, inputs, exclude=["layer9.*"])


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class _Looping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _repeated(x)


def _repeated(x: Tensor) -> Tensor:
    while x.norm() < 1:
        x = 2 * x
    return x


class _Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].sum()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (_Branching(), "return x + 1 if x.sum() > 0 else x"),
        (_Looping(), "while x.norm() < 1:"),
        (_Masked(), "return x[x > 0].sum()"),
    ],
)
def test_control_flow_that_depends_on_data_is_an_error_that_names_the_line(
    module: nn.Module, line: str
) -> None:
    place = rf"{re.escape(__file__)}.*\d+.*`{re.escape(line)}`"
    with pytest.raises(ValueError, match=f"Shrinking needs .* Found `.*{place}"):
        structure_of(module, torch.randn(2, 3))


def test_inputs_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="needs a module that runs on `example_input`.*same reduction dim"):
        structure_of(nn.Linear(3, 2), torch.randn(2, 4))


def test_a_class_is_no_module() -> None:
    with pytest.raises(TypeError, match="`module` must be a `Module`"):
        structure_of(nn.Linear, torch.randn(2, 3))  # type: ignore[arg-type]


def test_tracing_leaves_the_module_in_its_mode() -> None:
    module, inputs = make("auxiliary")
    module.train()
    module.stem.eval()
    structure_of(module, inputs)
    assert module.training
    assert not module.stem.training
