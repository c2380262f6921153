"""A teacher's outputs on disk, so that it needs to run once for each sample and not in every epoch."""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_path, require_type, require_whole
from lightning_structopt.distillation.cache.encoding import Encoding, Rounded, TopK, name_of
from lightning_structopt.distillation.cache.filling import each_batch, outputs_of
from lightning_structopt.distillation.cache.fingerprint import fingerprint
from lightning_structopt.distillation.cache.layout import Layout
from lightning_structopt.distillation.cache.memory_maps import Numbers
from lightning_structopt.distillation.cache.sample_ids import REMEDY
from lightning_structopt.distillation.cache.store import Store

Forward = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]
_NOISE = 5e-3  # of a teacher that computes in float32, maybe by TF32: other batch sizes take other kernels
NOISE_OF_HALF = 5e-2  # of one in half precision, whose rounding adds up from layer to layer


class TeacherCache:
    r"""What a teacher says of each sample, kept in a directory.

    Samples are known by number: let the loader's data set be ``WithIds(dataset)``. Every process writes files of its
    own and reads those of all, so that shuffling, workers and ranks need no care. A row counts once it is complete
    and its checksum fits: what a kill, a full disk or a cut-off file leaves behind is found missing and added again.

    With ``top_k``, of the output named ``"logits"`` only the :math:`k` largest of each row are kept, and the sum of
    what is left. The loss then sees those logits as they were, and all other classes with the same logit, so that
    probabilities at temperature 1 are the teacher's own for the :math:`k` classes and in sum for the others; at other
    temperatures they are close to it. All other outputs are kept as they are.

    Args:
        directory: Where the files are; it is made if need be.
        dtype: What numbers are kept in: ``"float16"``, ``"bfloat16"`` or ``"float32"``, also as ``torch.float16``.
            float32 gives back the very same numbers.
        top_k: How many logits of each row are kept, at least 1; None for all.
        class_dim: Which dimension of the logits classes are in: 1, or -1 for tokens (N, L, V).

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If ``top_k`` is not a whole number.

    Example:
        >>> import tempfile
        >>> cache = TeacherCache(tempfile.mkdtemp(), dtype="float32")
        >>> cache.open(fingerprint(nn.Linear(2, 3)))
        >>> cache.put(torch.tensor([5, 2]), {"logits": torch.tensor([[1.0, 2, 3], [4, 5, 6]])})
        >>> cache.get(torch.tensor([2]))
        {'logits': tensor([[4., 5., 6.]])}
        >>> cache.get(torch.tensor([2, 9])) is None
        True
    """

    def __init__(
        self,
        directory: str | Path,
        dtype: Literal["float16", "bfloat16", "float32"] | torch.dtype = torch.float16,
        top_k: int | None = None,
        class_dim: int = 1,
    ) -> None:
        name = name_of(dtype) if isinstance(dtype, torch.dtype) else dtype
        require_choice("dtype", name, ("float16", "bfloat16", "float32"))
        if top_k is not None:
            require_whole("top_k", top_k, 1)
        require_path("directory", directory)
        require_type("class_dim", class_dim, int)
        if class_dim == 0:
            raise ValueError(
                "`class_dim` is where classes are. Found 0, where samples are. Give 1, or -1 for tokens."
            )
        self.directory = Path(directory)
        self.dtype: torch.dtype = getattr(torch, name)
        self.top_k = top_k
        self.class_dim = class_dim
        self._store: Store | None = None

    @override
    def __repr__(self) -> str:
        return (
            f"TeacherCache(directory={str(self.directory)!r}, dtype={name_of(self.dtype)!r}, top_k={self.top_k!r}, "
            f"class_dim={self.class_dim!r})"
        )

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, maybe in another process, opens the files for itself.
        return TeacherCache, (self.directory, name_of(self.dtype), self.top_k, self.class_dim)

    def __len__(self) -> int:
        """Return how many samples are known to be there."""
        return len(self._store) if self._store is not None else 0

    def open(self, fingerprint: str, names: Collection[str] | None = None) -> None:
        """Read what is there, once; called again, what has come since.

        Args:
            fingerprint: Of the teacher, as :func:`fingerprint` gives it.
            names: Outputs that will be asked for; None for whatever is there.

        Raises:
            ValueError: If the directory holds outputs of another teacher, or was written with other arguments, or
                lacks an output.
        """
        settings = {"dtype": name_of(self.dtype), "top_k": self.top_k, "class_dim": self.class_dim}
        if self._store is not None and self._store.is_of(fingerprint) and self._store.is_whole():
            self._store.refresh()
        else:
            self._store = Store(self.directory, fingerprint, settings)
        layout = self._store.layout
        if layout is not None and (lacking := set(names or ()) - {name for name, _ in layout.shapes}):
            raise self._lacks(min(lacking), layout)

    def get(self, ids: Tensor, device: torch.device | str | None = None) -> dict[str, Tensor] | None:
        """Return the outputs of these samples by name; None unless all of them are there.

        Under DDP one rank may have its samples and another not, so what ranks do together must not depend on it.

        Args:
            ids: Numbers of samples (N,). On the CPU they save waiting for an accelerator.
            device: Where outputs go to; None for where ``ids`` are.

        Returns:
            Outputs (N, ...) in float32.
        """
        store = self._opened()
        places = store.find(_numbers(ids).tolist())
        if places is None or store.layout is None:
            return None
        where = ids.device if device is None else torch.device(device)
        parts = store.layout.unpack(store.read(places), where)
        return {name: self._encoding(name).decode(parts[name], shape) for name, shape in store.layout.shapes}

    def put(self, ids: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Add the outputs of these samples. Those that are there already, or come twice, must be the same.

        Args:
            ids: Numbers of samples (N,).
            outputs: Outputs (N, ...) by name, the same names and shapes each time; ``"logits"`` is what ``top_k`` acts
                on.

        Raises:
            ValueError: If outputs are not what they were, can't be kept in ``dtype``, or differ for one sample.
            OSError: If they can't be written, with what to do where the disk is full. The cache stays as it was.
        """
        store, numbers = self._opened(), _numbers(ids).tolist()
        rows = {name: _require_rows(name, output, len(numbers)) for name, output in outputs.items()}
        encoded = {name: self._encoding(name).encode(output) for name, output in rows.items()}
        layout = Layout.of(rows, encoded)
        store.require_layout(layout)
        known = [i for i, number in enumerate(numbers) if number in store]
        self._check_rows(ids, rows, known)  # before anything of a batch that may not fit is written
        first = {number: i for i, number in reversed(list(enumerate(numbers))) if number not in store}
        if new := sorted(first.values()):
            store.write(np.array(numbers)[new], layout.pack(encoded)[new], layout)
        self._check_rows(ids, rows, sorted(set(range(len(numbers))) - {*known, *new}))

    def check(self, ids: Tensor, outputs: Mapping[str, Tensor], tolerance: float | None = None) -> None:
        """Raise if what is kept isn't what the teacher says now, as under random augmentation.

        Args:
            ids: Numbers of samples (N,) that are all there.
            outputs: What the teacher says now, (N, ...) by name, in the precision that it computed in.
            tolerance: How far they may be apart, relative to the largest number of a row, or of rows on average where
                that is more; None for 0.05 where ``outputs`` are in half precision, and else for 0.005 or, if that is
                more, a few units of rounding in ``dtype``.

        Raises:
            ValueError: If they are further apart, or a sample or an output isn't there.
        """
        store, numbers = self._opened(), _numbers(ids).tolist()
        places = store.find(numbers)
        if places is None or store.layout is None:
            raise ValueError(
                "`check` compares samples that are in the cache. Found one that isn't. Call `put` first."
            )
        parts = store.layout.unpack(store.read(places), next(iter(outputs.values())).device)
        for name, output in outputs.items():
            if name not in parts:
                raise self._lacks(name, store.layout)
            live = _require_rows(name, output, len(numbers))
            gaps = self._encoding(name).gap(parts[name], live)
            _require_within(self._tolerance(live) if tolerance is None else tolerance, gaps, numbers, name)

    def fill(
        self,
        teacher: nn.Module,
        loader: Iterable[Any],
        forward: Forward = outputs_of,
        progress: bool = True,
    ) -> None:
        """Run the teacher on all samples that are missing, ahead of training. Cut off, it goes on where it was.

        Args:
            teacher: Any module; it runs in evaluation mode and where it is.
            loader: Gives batches of ``WithIds(dataset)``. What it leaves out, as by ``drop_last``, is left out.
            forward: Takes the teacher and a batch without numbers to the logits or to outputs by name.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: If samples carry no numbers or are not the same each time, or as :meth:`open` and :meth:`put`.
            OSError: As :meth:`put`.
        """
        self.open(fingerprint(teacher))
        for ids, batch in each_batch(teacher, loader, progress):
            if self._opened().find(_numbers(ids).tolist()) is None:
                outputs = forward(teacher, batch)
                self.put(ids, {"logits": outputs} if isinstance(outputs, Tensor) else outputs)

    def _opened(self) -> Store:
        if self._store is None:
            raise RuntimeError(
                f"`{self!r}` needs to know the teacher first. Found it not open. Call `open(fingerprint(teacher))`."
            )
        return self._store

    def _check_rows(self, ids: Tensor, outputs: Mapping[str, Tensor], rows: list[int]) -> None:
        if rows:
            self.check(ids[rows], {name: output[rows] for name, output in outputs.items()})

    def _lacks(self, name: str, layout: Layout) -> ValueError:
        return ValueError(
            f"A cache needs all outputs that are asked for. Found {layout.described} in '{self.directory}' and not "
            f"`{name}`. Give another `directory`, or remove that one; `fill` keeps what its `forward` returns."
        )

    def _encoding(self, name: str) -> Encoding:
        if name == "logits" and self.top_k is not None:
            return TopK(self.dtype, self.top_k, self.class_dim)
        return Rounded(self.dtype)

    def _tolerance(self, live: Tensor) -> float:
        noise = NOISE_OF_HALF if live.dtype in {torch.float16, torch.bfloat16} else _NOISE
        return max(4 * torch.finfo(self.dtype).eps, noise)


def _require_within(tolerance: float, gaps: Tensor, numbers: list[int], name: str) -> None:
    gaps = gaps.nan_to_num(torch.inf)
    if bool((gaps > tolerance).any()):
        worst = int(gaps.argmax())
        raise ValueError(
            "A cached sample must give the teacher's outputs again. Found that those of sample "
            f"{numbers[worst]} (`{name}`) differ by {gaps[worst].item():.2g} of their size: its input was not "
            f"the same, as by random augmentation, or two data sets share the cache. {REMEDY}"
        )


def _numbers(ids: Tensor) -> Numbers:
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"`ids` must be whole numbers of shape (N,). Found {ids.dtype} of shape {tuple(ids.shape)}. Let the "
            "loader's data set be `WithIds(dataset)`."
        )
    numbers: Numbers = ids.detach().cpu().numpy().astype(np.int64)
    return numbers


def _require_rows(name: str, output: Tensor, count: int) -> Tensor:
    if output.ndim == 0 or len(output) != count or not output.is_floating_point():
        raise ValueError(
            f"An output must be numbers for each sample, of shape ({count}, ...). Found `{name}`: {output.dtype} of "
            f"shape {tuple(output.shape)}. Give outputs whose first dimension is the batch."
        )
    return output.detach()
