"""`from moe import MoELayer` works, costs nothing before, and a wrong name says which there are."""

from __future__ import annotations

import subprocess
import sys

import pytest

import moe


@pytest.mark.parametrize("name", [n for n in moe.__all__ if n != "register_with_transformers"])
def test_names_are_those_of_the_layer(name):
    from moe import layer

    assert getattr(moe, name) is getattr(layer, name)
    assert name in dir(moe)


def test_import_moe_imports_no_torch():
    code = "import sys, moe; assert 'torch' not in sys.modules; from moe import MoELayer; print(MoELayer)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "moe.layer.moe_layer.MoELayer" in done.stdout


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match=r"has no attribute 'MoeLayer'; it has .*MoELayer"):
        _ = moe.MoeLayer
    with pytest.raises(ImportError, match="MoeLayer"):
        exec("from moe import MoeLayer")
