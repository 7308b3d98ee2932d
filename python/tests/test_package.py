"""What the package is, before it moves anything."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import refit_rl
from refit_rl import _core, errors

PACKAGE = Path(refit_rl.__file__).parent


def test_it_imports_without_torch_and_numpy() -> None:
    script = """
import sys
class No:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "nixl"):
            raise ImportError(name + " is not to be imported")
sys.meta_path.insert(0, No())
import refit_rl, refit_rl.layouts, refit_rl.errors, refit_rl.types, refit_rl.torch, refit_rl.bench
print(refit_rl.__version__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == refit_rl.__version__


def test_it_links_neither_torch_nor_cuda_nor_nixl() -> None:
    binary = Path(_core.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libpython3", b"libcuda.so.1\0libc.so"):
        assert library not in binary
    linked = subprocess.run(["ldd", _core.__file__], capture_output=True, text=True, check=True).stdout
    for library in ("torch", "cuda", "nixl", "ucp", "python"):
        assert library not in linked


def test_it_is_typed_and_the_stubs_say_what_there_is() -> None:
    assert (PACKAGE / "py.typed").exists()
    stubs = ast.parse((PACKAGE / "_core.pyi").read_text())
    said: dict[str, set[str]] = {}
    for node in stubs.body:
        if isinstance(node, ast.FunctionDef):
            said[node.name] = set()
        if isinstance(node, ast.AnnAssign):
            said[ast.unparse(node.target)] = set()
        if isinstance(node, ast.ClassDef):
            said[node.name] = {it.name for it in node.body if isinstance(it, ast.FunctionDef)}
    there = {name for name in dir(_core) if not name.startswith("_") or name == "__version__"}
    assert there == set(said)
    for name, methods in said.items():
        found = getattr(_core, name)
        if isinstance(found, type):
            public = {it for it in vars(found) if not it.startswith("_")}
            assert public == {it for it in methods if not it.startswith("_")}, name
            assert not methods - set(dir(found)), name
    for node in ast.walk(stubs):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        owner = [it for it in stubs.body if isinstance(it, ast.ClassDef) and node in it.body]
        found = getattr(getattr(_core, owner[0].name) if owner else _core, node.name)
        signature = getattr(found, "__text_signature__", None)
        if signature:
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            for argument in arguments:
                assert argument.arg in signature, (node.name, argument.arg)


def test_exceptions_are_one_hierarchy_and_cross_processes() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, refit_rl.RefitError)
        assert kind.__doc__
        there = pickle.loads(pickle.dumps(kind("what", ["a", "b"], [3])))
        assert (type(there), str(there), there.tensors, there.ranks) == (kind, "what", ("a", "b"), (3,))
    assert issubclass(errors.NotReadyError, TimeoutError)
    assert issubclass(errors.LayoutError, ValueError)


def test_addresses_that_are_none_are_refused() -> None:
    layout = refit_rl.layouts.shards({}, rank=0)
    for address, part in [("somewhere", "dir:PATH"), ("etcd:host:1", "etcd:http"), ("dir:", "dir:PATH")]:
        with pytest.raises(errors.ConfigError, match=part):
            refit_rl.Source(address, layout, {}, model="m")
