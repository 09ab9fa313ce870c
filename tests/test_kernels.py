"""Which modules of kernels are there: a package that is not installed is no news, one that does not load is."""

import sys
import warnings
from unittest.mock import patch

import pytest

from preftree.kernels import kernels_of

MODULE = "preftree.models.products_quack"
# Files of a package "quack" as the module of kernels imports it, each with what it is to be found lacking.
INTERFACE = """
def gemm_gated(config, concat_layout, preact_out, store_preact): pass
def gemm_dgated(config{dynamic}): pass
def gemm_tuned(C, config, concat_layout): pass
gemm_tuned.fn = gemm_tuned
"""
WHOLE = {"gemm_config": "GemmConfig = dict", "gemm_interface": INTERFACE.format(dynamic=", dynamic_scheduler")}
LACKING = {
    "too old": (
        WHOLE | {"gemm_interface": INTERFACE.format(dynamic="")},
        "lacks dynamic_scheduler: preftree needs 0.6.5 or later",
    ),
    "older still": ({"gemm_interface": WHOLE["gemm_interface"]}, "No module named 'quack.gemm_config'"),
    "without what it needs": (WHOLE | {"gemm_config": "import no_such_dsl"}, "No module named 'no_such_dsl'"),
    "other names": (WHOLE | {"gemm_config": ""}, "cannot import name 'GemmConfig'"),
}


@pytest.fixture
def quack(tmp_path, monkeypatch):
    """Installs a package of that name, from its files; without any it is one that is not installed."""

    def forget():
        for name in [name for name in sys.modules if name == MODULE or name.partition(".")[0] == "quack"]:
            del sys.modules[name]
        kernels_of.cache_clear()

    def install(files):
        forget()
        package = tmp_path / "quack"
        package.mkdir()
        (package / "__init__.py").write_text("")
        for name, code in files.items():
            (package / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)

    with patch.dict(sys.modules):
        forget()
        sys.modules["quack"] = None
        yield install
    kernels_of.cache_clear()


@pytest.mark.parametrize("name", LACKING)
def test_packages_that_do_not_load_are_warned_of(quack, name):
    files, reason = LACKING[name]
    quack(files)
    with pytest.warns(UserWarning, match=f"without the kernels of {MODULE}, which is slower: .*{reason}"):
        assert kernels_of(MODULE) is None


def test_packages_that_load_or_are_not_there(quack):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels_of(MODULE) is None
        quack(WHOLE)
        found = kernels_of(MODULE)
    assert found.refusal((9, 0)) is None
    assert "9.x" in found.refusal((8, 0))


def test_modules_that_we_do_not_have():
    with pytest.raises(ModuleNotFoundError, match="no_such_kernels"):
        kernels_of("preftree.no_such_kernels")
