"""What other libraries make of padding: the table in docs/masks.md, each number of it computed here.

python docs/peers.py    prints the rows of what is installed
python docs/peers.py --write    writes the table, with all of them:
    pip install --target build/peers jax==0.10.2 keras==3.15.1 optax==0.2.8
    pip install --target build/peers --no-deps allennlp==2.10.1    # which asks for an older torch
    PYTHONPATH=build/peers python docs/peers.py --write

It is kept because the page says what others do wrong, which whoever doubts it can run. The tests run the rows of torch
and of this library, and of the others where they are installed.
"""

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import masked_loss

os.environ.setdefault("KERAS_BACKEND", "torch")
PAGE = Path(__file__).with_name("masks.md")

# Two sequences of 3 tokens and 4 classes; the second has one token, and two of padding.
LOGITS = torch.tensor(
    [
        [[2.0, 0.0, 1.0, -1.0], [0.5, 1.5, 0.0, 0.0], [0.0, 0.0, 3.0, 1.0]],
        [[1.0, -1.0, 0.0, 2.0], [4.0, 0.0, 0.0, 0.0], [0.0, 5.0, 1.0, 0.0]],
    ]
)
TARGET = torch.tensor([[0, 1, 3], [3, 2, 2]])
MASK = torch.tensor([[True, True, True], [True, False, False]])
RIGHT = F.cross_entropy(LOGITS[MASK], TARGET[MASK])


class Way(NamedTuple):
    library: str
    code: str  # what the table says
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, target and mask
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # where it is not torch's autograd


def each(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), target, reduction="none")


def torch_ways() -> list[Way]:
    def ignored(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.masked_fill(~mask, -100).flatten())

    return [
        Way("torch", "`(loss * mask).mean()`", lambda x, t, m: (each(x, t) * m).mean()),
        Way("torch", "`(loss * mask).sum() / mask.sum()`", lambda x, t, m: (each(x, t) * m).sum() / m.sum()),
        Way("torch", "`ignore_index`, flattened", ignored),
        Way("torch", "`logits[mask], target[mask]`", lambda x, t, m: F.cross_entropy(x[m], t[m])),
        Way("torch", "`torch.masked.mean(loss, mask=mask)`", lambda x, t, m: torch.masked.mean(each(x, t), mask=m)),
    ]


def keras_ways() -> list[Way]:
    import keras

    def masked(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        logits = logits * 1  # a tensor of its own, to carry the mask
        keras.src.backend.set_keras_mask(logits, mask)
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(target, logits)

    def weighted(reduction: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        return lambda x, t, m: loss(t, x, sample_weight=m.float())

    def ignored(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
        return loss(target.masked_fill(~mask, -1), logits)

    return [
        Way("keras", "a mask from `Masking` or `mask_zero=True`", masked),
        Way("keras", "`sample_weight=mask`", weighted("sum_over_batch_size")),
        Way("keras", '`sample_weight=mask`, `"mean_with_sample_weight"`', weighted("mean_with_sample_weight")),
        Way("keras", "`ignore_class`", ignored),
    ]


def optax_ways() -> list[Way]:
    import jax
    import jax.numpy as jnp
    import optax

    def mean_where(logits, target, mask):
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean(where=mask)

    def where(logits, target, mask):
        return optax.softmax_cross_entropy_with_integer_labels(logits, target, where=mask).mean()

    def weighted(logits, target, mask):
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        mask = mask.astype(float)  # XLA makes a selection of a product with booleans
        return (loss * mask).sum() / mask.sum()

    def way(code: str, loss: Callable) -> Way:
        def value(*operands: Tensor) -> Tensor:
            return torch.tensor(float(loss(*map(jnp.asarray, (o.numpy() for o in operands)))))

        def gradient(*operands: Tensor) -> Tensor:
            return torch.tensor(jax.grad(loss)(*(jnp.asarray(o.numpy()) for o in operands)).tolist())

        return Way("optax", code, value, gradient)

    return [
        way("`loss.mean(where=mask)`", mean_where),
        way("`softmax_cross_entropy_with_integer_labels(…, where=mask).mean()`", where),
        way("`(loss * mask).sum() / mask.sum()`, a mask of floats", weighted),
    ]


def allennlp_ways() -> list[Way]:
    # allennlp asks for torch below 1.13: its one file is loaded, with stand-ins for what that imports and does not use.
    (root,) = importlib.util.find_spec("allennlp").submodule_search_locations
    names = {"checks": ["ConfigurationError"], "util": ["int_to_device", "is_distributed", "is_global_primary"]}
    stand_ins = {"allennlp.common": ModuleType("allennlp.common")}
    for name, members in names.items():
        stand_ins[f"allennlp.common.{name}"] = module = ModuleType(name)
        vars(module).update(dict.fromkeys(members, Exception))
    sys.modules.update(stand_ins)
    spec = importlib.util.spec_from_file_location("allennlp_nn_util", Path(root) / "nn" / "util.py")
    util = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(util)
    for name in stand_ins:
        del sys.modules[name]

    def way(average: str) -> Way:
        loss = util.sequence_cross_entropy_with_logits
        code = f'`sequence_cross_entropy_with_logits(…, mask, average="{average}")`'
        return Way("allennlp", code, lambda x, t, m: loss(x, t, m, average=average))

    return [way("token"), way("batch")]


def transformers_ways() -> list[Way]:
    from transformers.loss.loss_utils import ForCausalLMLoss

    def way(code: str, counted: bool) -> Way:
        def loss(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
            labels = target.masked_fill(~mask, -100)
            count = mask.sum() if counted else None
            return ForCausalLMLoss(logits, None, 4, num_items_in_batch=count, shift_labels=labels)

        return Way("transformers", code, loss)

    return [way("labels of -100", False), way("labels of -100, `num_items_in_batch`", True)]


def masked_loss_ways() -> list[Way]:
    def sequences(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return masked_loss.cross_entropy(logits, target, mask, dim=-1, reduction="sequence_mean")

    return [
        Way(
            "masked-loss",
            "`cross_entropy(logits, target, mask, dim=-1)`",
            lambda x, t, m: masked_loss.cross_entropy(x, t, m, dim=-1),
        ),
        Way("masked-loss", '`reduction="sequence_mean"`', sequences),
    ]


LIBRARIES = {
    "torch": torch_ways,
    "keras": keras_ways,
    "optax": optax_ways,
    "allennlp": allennlp_ways,
    "transformers": transformers_ways,
    "masked-loss": masked_loss_ways,
}


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def number(value: Tensor) -> str:
    return "NaN" if value.isnan() else f"{value:.4g}"


def run(way: Way, logits: Tensor = LOGITS, target: Tensor = TARGET, mask: Tensor = MASK) -> tuple[str, str]:
    """The loss, and the gradient where the mask is False: 0, NaN or how much it is."""
    try:
        if way.gradient is not None:
            loss, gradient = way.loss(logits, target, mask), way.gradient(logits, target, mask)
        else:
            logits = logits.clone().requires_grad_()
            loss = way.loss(logits, target, mask)
            (gradient,) = torch.autograd.grad(loss, logits)
    except Exception as error:  # what a library says of a target out of range is its own
        return type(error).__name__, ""
    return number(loss), number(gradient[~mask].abs().max())


def cells(way: Way) -> list[str]:
    value, _ = run(way)
    nan = run(way, logits=LOGITS.where(MASK[..., None], math.nan))
    outside, _ = run(way, target=TARGET.where(MASK, 99))
    nothing = run(way, mask=torch.zeros_like(MASK))
    return [value, ", ".join(nan), outside, ", ".join(nothing)]


def row(way: Way) -> str:
    return f"| {way.library} | {way.code} | {' | '.join(cells(way))} |"


def rows() -> list[str]:
    """Of the libraries that are installed."""
    return [row(way) for name in versions() for way in LIBRARIES[name]()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", action="store_true", help=f"write into {PAGE.name}; every library has to be installed"
    )
    write = parser.parse_args().write
    found = versions()
    lines = [
        "| library | way | mean | NaN logits in the padding: loss, gradient there | target 99 in the padding "
        "| nothing kept: loss, gradient |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *rows(),
        "",
        f"Run with {', '.join(f'{name} {version}' for name, version in found.items())}.",
    ]
    print("\n".join(lines))
    if write:
        if missing := LIBRARIES.keys() - found.keys():
            parser.error(f"not installed: {', '.join(sorted(missing))}")
        between = re.compile(r"(?<=<!-- docs/peers.py writes from here -->\n\n).*(?=\n<!-- to here -->)", re.DOTALL)
        PAGE.write_text(between.sub("\n".join(lines) + "\n", PAGE.read_text()))


if __name__ == "__main__":
    main()
