"""``lct conformance``: what fails is said."""

import sys

import pytest
import torch

from lct_core.cli import conformance, main
from tests.cli.arguments import refused


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("{}", "MODULE:FACTORY: got '{}', expected a module and a function in it, like my_adapter:make"),
        ("{}.py:make", "but there is no module '{}.py' here or installed"),
        ("./{}.py:make", "MODULE:FACTORY: got './"),
        ("{}:", "MODULE:FACTORY: got '{}:', expected a module and a function"),
        (":make", "MODULE:FACTORY: got ':make', expected a module and a function"),
        ("{}:make:make", "expected a module and a function"),
        (".{}:make", "expected a module and a function"),
        (
            "no_such_module_at_all:make",
            "got 'no_such_module_at_all:make', but there is no module 'no_such_module_at_all'",
        ),
        ("torch.no_such_part:make", "there is no module 'torch.no_such_part' here or installed"),
        ("{}:absent", "{} has no 'absent'; what it has to call: ["),
        ("{}:Holder.absent", "{} has no 'Holder.absent'"),
        ("{}:number", "{}:number is a int, expected a function that takes no argument"),
        ("{}:fails", "{}:fails() raised RuntimeError: no luck"),
        ("{}:takes", "{}:takes() raised TypeError: takes() missing 1 required positional argument: 'one'"),
        ("{}:nothing", "{}:nothing() returned a NoneType, expected a model (nn.Module) or an adapter"),
        ("{}:linear", "no backbone handles torch.nn.modules.linear.Linear; there are: cogvideox: "),
    ],
)
def test_no_factory(factories, capsys, factory, words):
    line = refused(capsys, ["conformance", factory.format(factories)])
    assert line.startswith("lct conformance: error: ")
    assert words.format(factories) in line


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_dependency", "raised ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("def", "raised SyntaxError: "),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path, capsys, source, words):
    (tmp_path / "broken_factories.py").write_text(source)
    line = refused(capsys, ["conformance", "broken_factories:make"])
    assert line.startswith("lct conformance: error: MODULE:FACTORY: importing broken_factories raised")
    assert words in line


@pytest.mark.parametrize("option", ["--scheme", "--dtype"])
def test_conformance_options(factories, capsys, option):
    assert f"Invalid value for '{option}': 'x' is not one of" in refused(capsys, ["conformance", "a:b", option, "x"])


@pytest.fixture
def _one_thread():
    """Many threads on tiny tensors wait for one another where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_conformance_of_the_mmdit(factories, capsys):
    before = [*sys.path]
    assert main(["conformance", f"{factories}:make", "--scheme", "anchored", "--dtype", "float32"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"{len(lines)} checks, all hold"
    assert {line[8] for line in lines} >= set("12345678")
    assert all(line.startswith("ok  ") and "  error " in line and ", bound " in line for line in lines)
    assert sys.path == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {("paper", "anchored"), (torch.float32, torch.bfloat16)}),
        (
            ["--scheme", "anchored", "--scheme", "paper", "--dtype", "bfloat16"],
            {("anchored", "paper"), (torch.bfloat16,)},
        ),
    ],
)
def test_what_failed_is_said(factories, capsys, monkeypatch, options, expected):
    from lct_core.testing import conformance as suite

    def findings(factory, *, schemes, dtypes):
        assert {tuple(schemes), tuple(dtypes)} == expected
        yield suite.Finding(1, "one shot equals the base model", "paper, float32", 0.0, 0.0)
        yield suite.Finding(4, "cached equals uncached", "paper, float32", 0.125, 1e-6)
        yield suite.Finding(3, "the future does not matter", "paper, float32", float("nan"), 0.0)

    monkeypatch.setattr(conformance, "conformance", findings)
    assert main(["conformance", f"{factories}:make", *options]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok      1  one shot equals the base model  [paper, float32]  error 0, bound 0",
        "FAILED  4  cached equals uncached  [paper, float32]  error 0.12, bound 1e-06",
        "FAILED  3  the future does not matter  [paper, float32]  error nan, bound 0",
        "2 of 3 checks FAILED, of invariants 3, 4",
    ]


def test_an_exception_fails_its_invariant_and_names_the_line(factories, capsys, monkeypatch):
    from lct_core.scene_model import SceneModel

    monkeypatch.setattr(SceneModel, "__call__", lambda *_, **__: [].pop())
    assert main(["conformance", f"{factories}:make", "--scheme", "paper", "--dtype", "float32"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAILED  3  raised IndexError: ") and "test_conformance.py:" in line for line in lines)
    assert lines[-1].endswith("of invariants 1, 2, 3, 4, 5, 6, 7, 8, 9")


def test_failing_to_batch_fails_one_invariant_alone(factories, capsys, monkeypatch):
    from lct_core.scene_model import SceneModel

    call = SceneModel.__call__

    def one_by_one(self, *arguments, **options):
        assert not self.batch_shots, "no batches"
        return call(self, *arguments, **options)

    monkeypatch.setattr(SceneModel, "__call__", one_by_one)
    assert main(["conformance", f"{factories}:make", "--scheme", "paper", "--dtype", "float32"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("checks FAILED, of invariants 5")


@pytest.mark.parametrize("factory", ["make", "make_adapter", "Holder.make"])
def test_factories(factories, monkeypatch, tmp_path, factory):
    monkeypatch.syspath_prepend(str(tmp_path))
    made = conformance.load_factory(f"{factories}:{factory}")()
    assert len(made.blocks) == 2
