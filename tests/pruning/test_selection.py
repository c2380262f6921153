import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_structopt.pruning.selection import select_parameters


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bilinear = nn.Bilinear(2, 2, 2)
        self.conv = nn.ModuleList([nn.Conv1d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv3d(2, 2, 3)])
        self.up = nn.ModuleList([nn.ConvTranspose1d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3)])
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(4, 2, kdim=2, vdim=2)
        self.lstm = nn.LSTM(4, 4, proj_size=2)
        self.cell = nn.GRUCell(4, 4)
        self.norm = nn.LayerNorm([2, 2])
        self.batch_norm = nn.BatchNorm2d(2)
        self.embedding = nn.Embedding(5, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))


DEFAULT = {
    "linear.weight", "bilinear.weight", "conv.0.weight", "conv.1.weight", "conv.2.weight", "up.0.weight",
    "up.1.weight", "attention.in_proj_weight", "attention.out_proj.weight", "cross.q_proj_weight",
    "cross.k_proj_weight", "cross.v_proj_weight", "cross.out_proj.weight", "lstm.weight_ih_l0",
    "lstm.weight_hh_l0", "lstm.weight_hr_l0", "cell.weight_ih", "cell.weight_hh",
}  # fmt: skip


def test_default_is_every_weight_of_a_layer_that_multiplies() -> None:
    assert set(select_parameters(Everything())) == DEFAULT


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("conv.*", None, {"conv.0.weight", "conv.1.weight", "conv.2.weight"}),
        (["linear.*", "cell.weight_?h"], None, {"linear.weight", "cell.weight_ih", "cell.weight_hh"}),
        ("embedding.weight", None, {"embedding.weight"}),
        ("token", None, {"token"}),
        (nn.Embedding, None, {"embedding.weight"}),
        ([nn.Embedding, "*.weight_hh"], None, {"embedding.weight", "cell.weight_hh"}),
        (None, ["*_proj*", nn.RNNBase, "conv*", "up*"], {
            "linear.weight", "bilinear.weight", "cell.weight_ih", "cell.weight_hh",
        }),
        ("conv.*", nn.Conv2d, {"conv.0.weight", "conv.2.weight"}),
    ],
)  # fmt: skip
def test_include_and_exclude(include, exclude, expected) -> None:
    assert set(select_parameters(Everything(), include, exclude)) == expected


def test_spare_leaves_out_the_ends() -> None:
    module = nn.Sequential(nn.LSTM(3, 3), nn.Linear(3, 3), nn.MultiheadAttention(4, 2))
    names = {
        "first": ["1.weight", "2.in_proj_weight", "2.out_proj.weight"],
        "last": ["0.weight_ih_l0", "0.weight_hh_l0", "1.weight", "2.in_proj_weight"],
        "both": ["1.weight", "2.in_proj_weight"],
    }
    for spare, expected in names.items():
        assert list(select_parameters(module, spare=spare)) == expected


def test_order_is_that_of_named_parameters() -> None:
    module = Everything()
    assert list(select_parameters(module)) == [n for n, _ in module.named_parameters() if n in DEFAULT]


def test_tied_parameters_count_once_and_match_by_either_name() -> None:
    module = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
    module["two"].weight = module["one"].weight
    assert list(select_parameters(module)) == ["one.weight"]
    assert list(select_parameters(module, "two.*")) == ["one.weight"]


def test_a_weight_tied_to_an_embedding_is_an_embedding() -> None:
    module = nn.ModuleDict({"body": nn.Linear(4, 4), "embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    module["head"].weight = module["embed"].weight
    assert list(select_parameters(module)) == ["body.weight"]
    assert list(select_parameters(module, "embed.weight")) == ["embed.weight"]


def test_compiled_submodules_match_by_their_plain_names() -> None:
    module = nn.ModuleDict({"net": torch.compile(nn.Linear(3, 3))})
    assert list(select_parameters(module, "net.weight")) == ["net._orig_mod.weight"]
    assert list(select_parameters(module, "net._orig_mod.*")) == ["net._orig_mod.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pick_that_matches_nothing_names_what_exists(argument: str) -> None:
    module = nn.ModuleDict({"encoder": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
    expected = (
        rf"No parameter matches `{argument} = 'backbone.\*'`. Parameters start with: 'encoder', 'head'."
    )
    with pytest.raises(ValueError, match=expected):
        select_parameters(module, **{argument: "backbone.*"})
    with pytest.raises(ValueError, match=f"No parameter matches `{argument} = Conv2d`"):
        select_parameters(module, **{argument: nn.Conv2d})


def test_a_glob_that_matches_only_what_is_not_pruned() -> None:
    with pytest.raises(ValueError, match=r"Found only 'embedding.weight', not pruned by default"):
        select_parameters(Everything(), "embedding*")
    with pytest.raises(ValueError, match=r"Found only 'linear.bias'"):
        select_parameters(Everything(), "linear.bias")


def test_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match="at least one weight to prune. Found none in `BatchNorm2d`"):
        select_parameters(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="Found none in `Linear`"):
        select_parameters(nn.Linear(3, 3), exclude="*")


@pytest.mark.parametrize("pick", [3, nn.Linear(2, 2), int])
def test_a_pick_of_the_wrong_kind(pick: object) -> None:
    with pytest.raises(TypeError, match="`include` takes globs on parameter names and module types. Found"):
        select_parameters(nn.Linear(3, 3), [pick])


def test_a_computed_weight_is_refused_unless_excluded() -> None:
    module = nn.Sequential(weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"Found that `0.weight` is computed .* give `exclude = '0.weight'`"):
        select_parameters(module)
    assert list(select_parameters(module, exclude="0.weight")) == ["1.weight"]
    assert list(select_parameters(module, include="1.*")) == ["1.weight"]


def test_a_weight_that_cannot_hold_zeros() -> None:
    with pytest.raises(TypeError, match="Found that `weight` is lazy. Run one forward pass"):
        select_parameters(nn.LazyLinear(3))
    sparse = nn.Linear(3, 3)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse())
    with pytest.raises(TypeError, match=r"Found that `weight` is Tensor of torch.float32, torch.sparse_coo"):
        select_parameters(sparse)
    quantized = nn.Linear(3, 3)
    quantized.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="torch.int8"):
        select_parameters(quantized)
