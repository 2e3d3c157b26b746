"""`python -m masked_loss inspect`, run as a user runs it: the numbers, each warning and each error."""

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread

import masked_loss
from masked_loss import _inspect
from masked_loss.__main__ import main


@pytest.fixture(autouse=True)
def on_the_cpu():
    """What is saved and read again lies there, whatever device the tests are run for."""
    with torch.device("cpu"):
        torch.manual_seed(0)
        yield


def batch(**changed):
    """Three sequences of 6, 2 and 3 positions, padded to 6."""
    logits = 2 * torch.randn(3, 6, 5)
    targets = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 0, 0, 0, 0], [3, 3, 1, 0, 0, 0]])
    mask = masked_loss.sequence_mask(torch.tensor([6, 2, 3]), 6)
    return {"logits": logits, "targets": targets, "mask": mask, **changed}


def saved(tmp_path, content):
    path = tmp_path / "batch.pt"
    torch.save(content, path)
    return path


def command(*arguments, code=None):
    start = ["-m", "masked_loss"] if code is None else ["-c", code]
    return subprocess.run([sys.executable, *start, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def call(monkeypatch, capsys):
    """The same in this process: exit status, what is printed, and what is said on stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["masked_loss", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return call


def warnings_of(tmp_path, content, dim=None):
    return _inspect.warnings(_inspect.read(saved(tmp_path, content), dim))


def numbers(printed):
    return {name: value for name, value in re.findall(r"^(.+): (\S+)$", printed, re.MULTILINE)}


def each_of(content):
    return F.cross_entropy(content["logits"].transpose(1, 2), content["targets"], reduction="none")


def test_numbers_and_picture(tmp_path):
    content = batch(names=["first", "second", "third"])
    each, mask = each_of(content), content["mask"]
    done = command("inspect", saved(tmp_path, content))
    assert done.returncode == 0 and done.stderr == ""
    assert "logits [3, 6, 5] float32, 5 classes in dim 2; targets [3, 6] int64; mask [3, 6] bool\n" in done.stdout
    assert "18 positions: 11 count, 7 are padding (38.9%), 0 hold ignore_index -100\n" in done.stdout
    found = numbers(done.stdout)
    assert found["effective normalizer"] == "11"
    per_sequence = torch.stack([each[i][mask[i]].mean() for i in range(3)])
    for name, expected in {
        "mean over what counts": each[mask].mean(),
        "mean over everything, loss.mean()": each.mean(),
        "(loss * mask).mean()": (each * mask).mean(),
        "mean of the sequences' means": per_sequence.mean(),
    }.items():
        assert float(found[name]) == pytest.approx(expected.item(), rel=1e-4)

    row = re.search(r"^second +2 of 6 +(\S+) +(\S+) +(.*)$", done.stdout, re.MULTILINE)
    assert float(row[1]) == pytest.approx(per_sequence[1].item(), rel=1e-3)
    assert float(row[2]) == pytest.approx(each[1][2:].mean().item(), rel=1e-3)
    costs = [f"{cost:.3g}" for cost in each[1].tolist()]
    assert row[3].split() == costs[:2] + [f"({cost})" for cost in costs[2:]]

    assert "warning" not in done.stdout
    picture = tmp_path / "batch.png"
    assert done.stdout.splitlines()[-1] == f"picture: {picture}"
    image = imread(picture)[..., :3]
    grey = (abs(image - [0xE4 / 255, 0xE6 / 255, 0xE9 / 255]) < 0.002).all(-1)
    assert 0.2 < grey.mean() < 0.6  # the padding above and what counts below


def test_limit_and_picture_options(tmp_path, call):
    path = saved(tmp_path, batch())
    _, printed, _ = call("inspect", path, "--limit=2", "--no-picture")
    assert re.search(r"^1 +2 of 6 .* \.\.\. 4 more\n\.\.\. 1 more$", printed, re.MULTILINE)
    assert not (tmp_path / "batch.png").exists()
    call("inspect", path, f"--picture={tmp_path / 'new' / 'other.png'}")
    assert (tmp_path / "new" / "other.png").stat().st_size > 5000


def test_without_matplotlib(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from masked_loss.__main__ import main; main()"
    done = command("inspect", saved(tmp_path, batch()), code=code)
    assert done.returncode == 0
    assert done.stderr == "no picture: matplotlib is not installed (pip install matplotlib, or --no-picture)\n"
    assert "effective normalizer: 11" in done.stdout


def test_other_layouts(tmp_path):
    content = batch()
    expected = _inspect.means(_inspect.read(saved(tmp_path, content)))
    content["logits"] = content["logits"].transpose(1, 2).bfloat16().float()
    shifted = _inspect.means(_inspect.read(saved(tmp_path, content)))
    assert shifted == pytest.approx(expected, rel=1e-2)
    content |= {"mask": content["mask"].long(), "logits": content["logits"].bfloat16()}
    assert _inspect.means(_inspect.read(saved(tmp_path, content))) == pytest.approx(shifted, rel=1e-6)
    flat = {"logits": torch.randn(4, 5), "targets": torch.arange(4), "mask": torch.tensor([True, True, False, True])}
    read = _inspect.read(saved(tmp_path, flat))
    assert read.kept.shape == (1, 4)
    assert _inspect.warnings(read) == []


def test_square_logits_need_the_dimension(tmp_path, call):
    path = saved(tmp_path, batch(logits=torch.randn(3, 6, 6)))
    status, _, said = call("inspect", path)
    assert status == 2
    assert said == f"inspect: {path}: expected --dim: the classes of logits [3, 6, 6] may lie in dim 1 or 2\n"
    assert call("inspect", path, "--dim=-1", "--no-picture")[0] == 0


def test_ignored_positions(tmp_path):
    content = batch()
    content["targets"][0, :2] = -100
    read = _inspect.read(saved(tmp_path, content))
    assert "9 count, 7 are padding (38.9%), 2 hold ignore_index -100" in _inspect.report(read, 12)
    assert re.search(r"^0 +4 of 6 +\S+ +- +ignored ignored \d", _inspect.report(read, 12), re.MULTILINE)
    assert _inspect.warnings(read) == []
    expected = masked_loss.cross_entropy(content["logits"], content["targets"], content["mask"], dim=-1)
    assert _inspect.means(read)["mean over what counts"] == pytest.approx(expected.item(), rel=1e-5)


def test_warning_inverted(tmp_path):
    content = batch()
    for changed, what in (({}, "are all 0"), ({"ignore_index": 0}, "hold no class")):
        (warning,) = [
            w for w in warnings_of(tmp_path, content | changed | {"mask": ~content["mask"]}) if "inverted" in w
        ]
        assert warning == (
            f"the mask looks inverted: targets that count {what}, those in the padding hold "
            f"{5 if not changed else 4} classes. True means keep: try ~mask"
        )


def test_warning_target_out_of_range(tmp_path):
    content = batch()
    content["targets"][1, 1] = 7
    content["targets"][2, 5] = -9  # in the padding: no mistake
    assert warnings_of(tmp_path, content) == [
        "1 target that counts is no class of the 5: the first is 7, sequence 1, position 1; "
        "cross_entropy raises an IndexError"
    ]
    read = _inspect.read(saved(tmp_path, content))
    assert _inspect.means(read)["mean over what counts"] is None
    assert "mean over what counts: an IndexError\n" in _inspect.report(read, 12)
    content["targets"][1, 1] = 2
    read = _inspect.read(saved(tmp_path, content))
    assert "mean over everything, loss.mean(): an IndexError\n" in _inspect.report(read, 12)
    assert "(error)" in _inspect.report(read, 12)
    assert _inspect.warnings(read) == []


def test_warning_empty_sequences(tmp_path):
    content = batch(names=["a", "b", "c"])
    content["mask"][1:] = False
    assert warnings_of(tmp_path, content) == ["2 of 3 sequences have no position that counts: b, c"]
    content["mask"][:] = False
    (warning,) = warnings_of(tmp_path, content)
    assert warning == "nothing is kept: the loss is 0, with a zero gradient, and this batch teaches nothing"


def test_warning_nan(tmp_path):
    content = batch()
    content["logits"][1, 3:5, 0] = float("nan")
    assert warnings_of(tmp_path, content) == [
        "2 positions with NaN or inf in their logits are padding: loss * mask would be NaN"
    ]
    content["logits"][0, 0, 0] = float("inf")
    assert (
        warnings_of(tmp_path, content)[0] == "1 position with NaN or inf in its logits counts: the loss is not finite"
    )


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        (lambda each, mask: each.mean(), "is the mean over everything, loss.mean()"),
        (lambda each, mask: (each * mask).mean(), "is the (loss * mask).mean()"),
        (lambda each, mask: each[~mask].mean(), "is the mean over the padding"),
        (lambda each, mask: ((each * mask).sum(1) / mask.sum(1)).mean(), "is the mean of the sequences' means"),
        (lambda each, mask: (each * mask).sum() / 3, "is the sum over what counts, divided by the 3 sequences"),
        (lambda each, mask: (each * mask).sum(), "is the sum over what counts"),
        (lambda each, mask: each[mask].mean() / 2, "is half of the mean over what counts"),
        (lambda each, mask: each.sum(), "is not the mean over what counts"),
        (lambda each, mask: each[mask].mean(), None),
    ],
)
def test_warning_of_the_saved_loss(mistake, name, tmp_path):
    content = batch()
    loss, right = mistake(each_of(content), content["mask"]), each_of(content)[content["mask"]].mean()
    found = warnings_of(tmp_path, content | {"loss": loss})
    if name is None:
        assert found == []
        return
    (warning,) = found
    assert f"the loss that was saved, {loss:.6g}, {name}" in warning
    assert f"{right:.4g}" in warning


def test_warning_of_a_saved_loss_that_counts_empty_sequences(tmp_path):
    content = batch(mask=masked_loss.sequence_mask(torch.tensor([6, 0, 3]), 6))
    each, mask = each_of(content), content["mask"]
    loss = ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    assert (
        "is the mean of the sequences' means, 0 for the empty ones"
        in warnings_of(tmp_path, content | {"loss": loss})[1]
    )


def next_token_batch(offset=1, **changed):
    """Labels as Hugging Face's batches have them, and logits of a model that knows what follows."""
    labels = torch.randint(9, (4, 12))
    labels[1, 7:] = labels[2, 3:] = -100
    seen = labels.clamp(min=0).roll(-offset, 1)
    logits = torch.randn(4, 12, 9) + 4 * F.one_hot(seen, 9)
    return {"logits": logits, "labels": labels, **changed}


def series(**changed):
    """A regression, [B, T, D], with NaN where nothing was measured."""
    target = torch.randn(3, 5, 2)
    target[1, 3:] = target[2, 0, 1] = torch.nan
    return {"input": torch.randn(3, 5, 2), "target": target, **changed}


def measured(content):
    return content | {"mask": ~content["target"].isnan()}


CERTAIN = {"mask": masked_loss.sequence_mask(torch.tensor([8, 3, 5]), 8), "targets": torch.randint(5, (3, 8))}
# For each mistake what may be saved, and what is said of it.
MISTAKES = {
    "lengths_for_a_mask": [
        (
            lambda: batch(mask=torch.tensor([[6], [2], [0]])),
            r"mask holds lengths \(0, 2, 6\) instead of True and False: masked_loss.sequence_mask\(lengths, 6\) is",
        ),
        (lambda: batch(mask=torch.tensor([6, 2, 3])), r"mask holds lengths \(2, 3, 6\)"),
        (lambda: batch(mask=torch.tensor([[6.0], [2.0], [3.0]])), r"mask holds lengths \(2, 3, 6\)"),
        (lambda: series(mask=torch.tensor([5, 3, 5])), r"sequence_mask\(lengths, 5\)"),
    ],
    "weights_for_a_mask": [
        (
            lambda: batch(mask=torch.tensor([[1.0], [0.5], [0.0]])),
            r"mask holds weights \(0, 0.5, 1\) instead of True and False: pass it as sample_weight",
        ),
    ],
    "numbers_for_a_mask": [
        (lambda: batch(mask=torch.arange(18).view(3, 6)), r"other integers than 0 and 1 \(0, 1, 2, 3, 4, \.\.\.\)"),
        (lambda: batch(mask=~batch()["mask"].long()), r"\(-2, -1\): ~ of an integer mask is -1 and -2, try mask == 0"),
    ],
    "nothing_kept": [(lambda: batch(mask=torch.zeros(3, 6)), "nothing is kept")],
    "empty_rows": [
        (
            lambda: batch(mask=torch.tensor([[1], [0], [1]]), names=["a", "b", "c"]),
            "1 of 3 sequences has no position that counts: b",
        ),
        (
            lambda: {
                "logits": torch.randn(2, 5, 3, 4),
                "targets": torch.zeros(2, 3, 4).long(),
                "mask": torch.eye(2)[:, :1, None],
            },
            "1 of 2 samples has no position that counts: 1",
        ),
    ],
    "inverted_mask": [
        (
            lambda: batch(mask=~batch()["mask"]),
            "looks inverted: targets that count are all 0, those in the padding hold 5",
        ),
        (
            lambda: {
                "logits": 6 * F.one_hot(CERTAIN["targets"].where(CERTAIN["mask"], 5), 6) + torch.zeros(()),
                **CERTAIN,
                "mask": ~CERTAIN["mask"],
            },
            r"looks inverted: what counts costs \S+, more than the padding's",
        ),
        (
            lambda: {"logits": torch.randn(3, 8, 5), **CERTAIN, "mask": ~CERTAIN["mask"]},
            "may be inverted: it leaves out the beginning of sequences and keeps their end",
        ),
        (lambda: series(mask=series()["target"].isnan()), "looks inverted: targets that count are all NaN"),
        (
            lambda: {
                "input": torch.randn(2, 4),
                "target": torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]]),
                "mask": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]),
            },
            "looks inverted: targets that count are all 0.0, those in the padding hold 3 numbers",
        ),
    ],
    "targets_outside": [
        (lambda: batch(targets=batch()["targets"] + 2), r"\d targets that count are no class of the 5: the first is"),
        (lambda: {"logits": torch.zeros(2, 3), "targets": torch.tensor([0, 5])}, "the first is 5, position 1; "),
    ],
    "targets_not_finite": [
        (
            series,
            r"5 targets that count are NaN or inf, and so is the loss: with target.isfinite\(\) for a mask it is \d",
        ),
        (
            lambda: series(mask=masked_loss.sequence_mask(torch.tensor([5, 3, 5]), 5)[..., None]),
            r"1 target that counts is NaN or inf, .* with mask & target.isfinite\(\) for a mask",
        ),
    ],
    "input_not_finite": [
        (
            lambda: measured(series(input=torch.full((3, 5, 2), torch.inf))),
            "positions with NaN or inf in their input or target count",
        ),
        (lambda: batch(logits=torch.full((3, 6, 5), torch.nan)), "11 positions with NaN or inf in their logits count"),
    ],
    "padding_not_finite": [
        (lambda: measured(series()), r"5 positions .* in their input or target are padding: loss \* mask would")
    ],
    "labels_of_padding": [
        (
            lambda: next_token_batch(attention_mask=masked_loss.sequence_mask(torch.tensor([12, 7, 3, 10])).long()),
            "2 labels in the padding are not -100: a loss without the mask",
        ),
    ],
    "missing_shift": [
        (
            next_token_batch,
            r"labels look unshifted: logits fit the next one \(\S+\) better than the one beside them \(\S+\)\. "
            r"For a causal model, F\.pad\(labels, \(0, 1\), value=-100\)\[:, 1:\] shifts them",
        ),
        (
            lambda: (lambda b: {"logits": b["logits"], "targets": b["labels"]})(next_token_batch()),
            "targets look unshifted",
        ),
    ],
    "another_loss": [
        (lambda: batch(loss=7.0), "the loss that was saved, 7, is not the mean over what counts; the mean")
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [pytest.param(name, *case, id=f"{name}-{i}") for name, cases in MISTAKES.items() for i, case in enumerate(cases)],
)
def test_mistake(name, content, said, tmp_path):
    (found,) = [mistake for mistake in _inspect.MISTAKES if mistake.__name__ == name]
    assert re.search(said, found(_inspect.read(saved(tmp_path, content()))) or "nothing is said")


def test_every_mistake_is_tested():
    assert [mistake.__name__ for mistake in _inspect.MISTAKES] == list(MISTAKES)


@pytest.mark.parametrize(
    "content",
    [
        batch,
        lambda: batch(mask=batch()["mask"].float()),
        lambda: next_token_batch(offset=0),
        # padding on the left, of one token
        lambda: batch(targets=batch()["targets"].flip(1), mask=batch()["mask"].flip(1)),
        # what counts is one token, or two
        lambda: batch(mask=F.pad(torch.ones(1, 2), (0, 4, 0, 2)), targets=torch.arange(18).view(3, 6) % 5),
        lambda: {"logits": torch.randn(4, 5), "labels": torch.arange(4)},
        lambda: measured({"input": torch.randn(4, 3), "target": torch.randn(4, 3)}),
        lambda: {"input": torch.randn(3), "target": torch.randn(3), "mask": torch.tensor([False, True, True])},
    ],
)
def test_what_is_no_mistake(content, tmp_path):
    found = [warning for warning in warnings_of(tmp_path, content()) if "no position that counts" not in warning]
    assert found == []


def test_labels_of_hugging_face(tmp_path, call):
    """The loss that was saved tells whether labels are shifted, or else what they fit."""
    content = next_token_batch()
    logits, labels = content["logits"], content["labels"]
    as_they_are = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    read = _inspect.read(saved(tmp_path, content))
    assert read.shifted and read.described.endswith("labels [4, 12] int64; no mask; labels shifted by one")
    assert _inspect.means(read)["mean over what counts"] == pytest.approx(shifted.item(), rel=1e-5)

    with_loss = saved(tmp_path, content | {"loss": shifted})
    assert _inspect.warnings(_inspect.read(with_loss)) == []
    _, printed, _ = call("inspect", with_loss, "--no-picture")
    assert "44 positions: 30 count, 0 are padding (0.0%), 14 hold ignore_index -100\n" in printed
    assert float(numbers(printed)["mean over what counts, labels as they are"]) == pytest.approx(
        as_they_are.item(), rel=1e-4
    )

    read = _inspect.read(saved(tmp_path, content | {"loss": as_they_are}))
    assert not read.shifted
    assert re.match("labels look unshifted", *_inspect.warnings(read))

    # Of logits that fit neither, only the saved loss tells.
    content = next_token_batch(logits=torch.randn(4, 12, 9))
    read = _inspect.read(saved(tmp_path, content))
    assert not read.shifted and _inspect.warnings(read) == []
    shifted = F.cross_entropy(content["logits"][:, :-1].flatten(0, 1), content["labels"][:, 1:].flatten())
    read = _inspect.read(saved(tmp_path, content | {"loss": shifted}))
    assert read.shifted and _inspect.warnings(read) == []


def test_regression(tmp_path, call):
    content = measured(series())
    x, y, mask = content["input"], content["target"], content["mask"]
    status, printed, _ = call("inspect", saved(tmp_path, content | {"loss": F.mse_loss(x[mask], y[mask])}))
    assert status == 0
    assert "input [3, 5, 2] float32; target [3, 5, 2] float32; mask [3, 5, 2] bool; squared differences\n" in printed
    assert "30 positions: 25 count, 5 are padding (16.7%)\n" in printed
    found = numbers(printed)
    assert float(found["mean over what counts"]) == pytest.approx(F.mse_loss(x[mask], y[mask]).item(), rel=1e-4)
    assert found["(loss * mask).mean()"] == found["mean over everything, loss.mean()"] == "nan"
    assert re.search(r"^sample +counts", printed, re.MULTILINE) and "sequence" not in printed

    finite = {"input": x, "target": y.nan_to_num(0), "mask": mask}
    for loss, said in (
        (F.mse_loss, "is the (loss * mask).mean()"),
        (F.l1_loss, "is the (loss * mask).mean()"),
        (F.huber_loss, "is not the mean over what counts"),
    ):
        value = (loss(finite["input"], finite["target"], reduction="none") * mask).mean()
        (warning,) = warnings_of(tmp_path, finite | {"loss": value})
        assert said in warning


def test_weights(tmp_path):
    weight = torch.rand(3, 6) * batch()["mask"]
    content = batch(mask=weight)
    right = masked_loss.cross_entropy(content["logits"], content["targets"], sample_weight=weight, dim=-1)
    read = _inspect.read(saved(tmp_path, content | {"loss": right}))
    assert _inspect.means(read)["mean over what counts"] == pytest.approx(right.item(), rel=1e-5)
    assert f"effective normalizer: {weight.sum():.4f}"[:-2] in _inspect.report(read, 12)
    unweighted = each_of(content)[weight > 0].mean()
    found = warnings_of(tmp_path, content | {"loss": unweighted})[1]
    assert "is the mean over what counts, without the weights" in found


def test_limit_is_no_negative_number(tmp_path, call):
    for value in ("-1", "x"):
        status, printed, said = call("inspect", saved(tmp_path, batch()), "--limit", value)
        assert (status, printed) == (2, "")
        assert said.endswith(f"argument --limit: expected a number that is not negative, got {value}\n")


def without(key):
    content = batch()
    del content[key]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), r"expected a dict of logits \(or input\) and targets \(or labels\), .*; got Tensor"),
        (without("targets"), r"expected a dict of .*; targets missing, got \['logits', 'mask'\]"),
        ({"mask": torch.ones(3)}, r"expected a dict of .*; logits, targets missing, got \['mask'\]"),
        (batch(logits=[1.0]), "expected logits to be a tensor, got list"),
        (batch(logits=torch.zeros(3, 6, 5).long()), "expected logits of a floating dtype, got torch.int64"),
        (batch(targets=torch.zeros(3, 6)), r"expected targets to be class indices \(.*\), got torch.float32"),
        (batch(mask=torch.ones(3, 6) * 1j), "expected mask of bool, integers or floats, got torch.complex64"),
        (batch(mask=[True]), "expected mask to be a tensor, got list"),
        (
            {"input": torch.zeros(3, 4), "target": torch.zeros(3, 1)},
            r"expected target of input's shape \[3, 4\], got \[3, 1\]",
        ),
        (batch(targets=torch.zeros(3, 4).long()), r"expected targets of logits' shape \[3, 6, 5\] .*, got \[3, 4\]"),
        (batch(mask=torch.ones(3).bool()), r"expected mask of targets' shape \[3, 6\], or 1s, got \[3\]"),
        (batch(mask=torch.ones(3, 5).bool()), r"expected mask of targets' shape \[3, 6\], or 1s, got \[3, 5\]"),
        (batch(names=["a"]), r"expected names to be a list of 3, one for each sequence, got \['a'\]"),
        (batch(ignore_index="x"), "expected ignore_index to be an int, got 'x'"),
        (batch(loss=[1.0]), "expected loss to be one number, got list"),
    ],
)
def test_errors(content, message, tmp_path):
    with pytest.raises(_inspect.BatchError, match=f"^{message}$"):
        _inspect.read(saved(tmp_path, content))


class Foreign:
    """What weights_only refuses."""


def test_error_of_files(tmp_path, call):
    missing = tmp_path / "none.pt"
    assert call("inspect", missing) == (2, "", f"inspect: {missing}: there is no such file\n")
    text = tmp_path / "text.pt"
    for written, error in (("logits", "UnpicklingError"), ("batch", "IndexError")):
        text.write_text(written)
        with pytest.raises(_inspect.BatchError, match=rf"^expected a file of torch.save that .*, got {error}$"):
            _inspect.read(text)
    with pytest.raises(
        _inspect.BatchError, match=r"weights_only=True\) takes, got UnpicklingError \(Unsupported .*Foreign"
    ):
        _inspect.read(saved(tmp_path, batch(extra=Foreign())))
    path = saved(tmp_path, batch())
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(
        _inspect.BatchError, match=r"^expected a file of torch.save that .*, got RuntimeError \(Pytorch"
    ):
        _inspect.read(path)
    with pytest.raises(_inspect.BatchError, match=r"^expected --dim to be a dimension of logits \[3, 6, 5\], got 3$"):
        _inspect.read(saved(tmp_path, batch()), 3)


def test_build_information(call):
    version, built, kernels, cuda, library = call("--info")[1].splitlines()
    assert version == f"masked_loss {masked_loss.__version__}"
    assert built.endswith(f"running with {torch.__version__}")
    capability = torch.backends.cpu.get_cpu_capability()
    assert re.fullmatch(r"CPU kernels: DEFAULT(, AVX2, AVX512)?; (\w+) runs here", kernels)
    assert capability not in kernels.partition(";")[0] or kernels.endswith(f"; {capability} runs here")
    assert re.fullmatch(r"CUDA kernels: (none|for .*\d.*)", cuda)
    assert f"{library}\n" == f"library: {call('--library')[1]}"
    assert call("--version")[:2] == (0, f"{masked_loss.__version__}\n")


def test_nothing_asked(call):
    status, printed, said = call()
    assert (status, printed) == (2, "")
    assert "expected one of inspect, --info, --cmake-dir, --library and --version" in said


def test_two_things_asked(call):
    status, printed, said = call("--info", "inspect", "batch.pt")
    assert (status, printed) == (2, "")
    assert "expected one of inspect, --info, --cmake-dir, --library and --version" in said


def test_a_picture_that_cannot_be_drawn(tmp_path, call):
    status, printed, said = call("inspect", saved(tmp_path, batch()), "--picture", tmp_path / "batch.nothing")
    assert status == 0
    assert "effective normalizer" in printed
    assert said.startswith("no picture: ")


def test_inspect_is_imported_when_it_is_asked_for():
    code = "import sys, masked_loss; print('masked_loss._inspect' in sys.modules, 'matplotlib' in sys.modules)"
    assert command(code=code).stdout == "False False\n"
