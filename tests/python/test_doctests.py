"""The examples in the package's docstrings."""

import doctest
import re

import pytest

import masked_loss
from masked_loss import functional, linear, masks, memory, modules, paths, pointwise, reductions, softmaxes

EXAMPLES = {
    example.name: example
    for module in (masked_loss, functional, linear, masks, memory, modules, paths, pointwise, reductions, softmaxes)
    for example in doctest.DocTestFinder().find(module)
    if example.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    failures = []
    doctest.DocTestRunner().run(EXAMPLES[name], out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("name", [name for name in masked_loss.__all__ if callable(getattr(masked_loss, name))])
def test_every_public_name_has_an_example(name):
    public = getattr(masked_loss, name)
    assert f"{public.__module__}.{public.__qualname__}" in EXAMPLES


@pytest.mark.parametrize("name", [name for name in masked_loss.__all__ if callable(getattr(masked_loss, name))])
def test_shared_text_is_filled_in(name):
    assert not re.search(r"^ *\{\w+\}$", getattr(masked_loss, name).__doc__, re.MULTILINE)
