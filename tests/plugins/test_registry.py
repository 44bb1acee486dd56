"""The registry: how plugins are found, refused and chosen among."""

import sys
from importlib.metadata import entry_points
from textwrap import dedent

import pytest
import torch

from lct_core import attention
from lct_core.attention import attend
from lct_core.layout import Layout, Shot
from lct_core.patterns import context_causal
from lct_core.plugins.hooks import BackboneSpec, KernelRequest, KernelSpec, PluginError, hookimpl
from lct_core.plugins.registry import Registry
from lct_core.plugins.torch_kernels import sdpa

PLAN = context_causal(Layout([[Shot(1, (1, 2, 2)), Shot(0, (1, 1, 3))]]))
REQUEST = KernelRequest(PLAN, torch.device("cpu"), torch.float32, 2, 2, 8, False)
GOOD = """
    from torch import nn
    from lct_core import BackboneSpec, KernelSpec, hookimpl

    class Model(nn.Module):
        def __init__(self, width=1):
            super().__init__()
            self.width = width

    class Adapter:
        def __init__(self, model):
            self.model = model

    def zeros(q, k, v, plan, scale):
        return q.new_zeros(q.shape)

    @hookimpl
    def lct_backbones():
        return [BackboneSpec(name="toy", summary="a toy", handles=(f"{__name__}.Model",), adapter=f"{__name__}:Adapter",
                             build=f"{__name__}:Model")]

    @hookimpl
    def lct_kernels():
        return [KernelSpec(name="zeros", summary="nothing", load=lambda: zeros, refusals=lambda request: [])]
"""
KERNEL = """
    from lct_core import KernelSpec, hookimpl

    def kernel(name):
        return KernelSpec(name=name, summary="", load=None, refusals=None)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution of one module and one entry point: a folder with its metadata on sys.path."""

    def install(name, code, *, entry=None, value=None):
        site, module = tmp_path / name, name.replace("-", "_")
        info = site / f"{module}-1.2.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(dedent(code))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[lct]\n{entry or module} = {value or module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(site)
        return module

    yield install
    for path in tmp_path.iterdir():
        sys.modules.pop(path.name.replace("-", "_"), None)


def installed():
    return Registry(entry_points(group="lct"))


def plugin(*, backbones=(), kernels=()):
    class Plugin:
        @hookimpl
        def lct_backbones(self):
            return list(backbones)

        @hookimpl
        def lct_kernels(self):
            return list(kernels)

    return Plugin()


def kernel(name="mine", *, rank=None, run=sdpa):
    return KernelSpec(name=name, summary="", load=lambda: run, refusals=lambda request: [], rank=rank)


def backbone(name, *classes, adapter="builtins:id", build=None, refuses=()):
    handles = tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in classes)
    refuses = {f"{cls.__module__}.{cls.__qualname__}": reason for cls, reason in dict(refuses).items()}
    return BackboneSpec(name=name, summary="", handles=handles, adapter=adapter, build=build, refuses=refuses)


# a good plugin


def test_a_plugin_is_found_by_its_entry_point(install, monkeypatch):
    before = installed()
    module = install("lct-toy", GOOD)
    registry = installed()
    assert set(registry.backbones) == {*before.backbones, "toy"}
    assert set(registry.kernels) == {*before.kernels, "zeros"}
    assert {"mmdit", "toy"} <= set(registry.backbones)
    assert {"sdpa", "reference", "flex", "zeros"} <= set(registry.kernels)

    q = torch.ones(1, PLAN.queries, 2, 8)
    monkeypatch.setattr(attention, "registry", lambda: registry)
    assert (attend(q, q, q, PLAN, kernel="zeros") == 0).all()
    assert (attend(q, q, q, PLAN, kernel="auto") == 1).all()  # one without a rank has to be asked for

    model = registry.build("toy", width=3)
    assert (type(model), model.width) == (sys.modules[module].Model, 3)
    adapter = registry.adapter(model)
    assert type(adapter) is sys.modules[module].Adapter
    assert adapter.model is model


def test_the_names_are_in_order():
    registry = Registry()
    registry.register(plugin(backbones=[backbone("b"), backbone("a")]), name="one")
    ranked = [kernel("z"), kernel("late", rank=200), kernel("first", rank=0), kernel("second", rank=1), kernel("b")]
    registry.register(plugin(kernels=ranked), name="two")
    assert list(registry.backbones) == ["a", "b"]
    assert list(registry.kernels) == ["b", "first", "late", "reference", "sdpa", "second", "z"]
    assert list(registry.ranks(REQUEST)) == ["first", "second", "sdpa", "late", "b", "reference", "z"]


def test_a_spec_is_light_until_it_is_used():
    registry = Registry()
    registry.register(
        plugin(backbones=[backbone("heavy", torch.nn.Linear, adapter="no_such_library:Adapter")]), name="x"
    )
    assert list(registry.backbones) == ["heavy"]
    with pytest.raises(PluginError, match=r"backbone .heavy. is broken: ModuleNotFoundError: .*no_such_library"):
        registry.adapter(torch.nn.Linear(1, 1))


def test_a_kernel_is_loaded_once():
    loaded = []

    def load():
        loaded.append(1)
        return sdpa

    registry = Registry()
    spec = KernelSpec(name="mine", summary="", load=load, refusals=lambda request: [])
    registry.register(plugin(kernels=[spec]), name="mine")
    assert not loaded
    assert registry.kernel("mine", REQUEST) is registry.kernel("mine", REQUEST) is sdpa
    assert len(loaded) == 1
    registry.register(plugin(kernels=[kernel("first", rank=0, run=max)]), name="other")
    registry.kernel("mine", REQUEST)
    assert len(loaded) == 2


def test_a_new_plugin_is_heard_by_auto():
    registry = Registry()
    assert registry.kernel("auto", REQUEST) is sdpa
    registry.register(plugin(kernels=[kernel("first", rank=0, run=max)]), name="other")
    assert registry.kernel("auto", REQUEST) is max


# a bad plugin


BAD = {
    "a crashing import": ("1 / 0", r"plugin 'lct_bad' \(lct_bad of lct-bad 1\.2\) cannot be loaded: ZeroDivisionError"),
    "a missing library": ("import no_such_library", r"cannot be loaded: ModuleNotFoundError: No module named 'no_such"),
    "a misspelt hook": (
        KERNEL + "    @hookimpl\n    def lct_kernel():\n        return []",
        r"plugin 'lct_bad' of lct-bad 1\.2: PluginValidationError: .*lct_kernel.*"
        r"the hooks there are: \['lct_backbones', 'lct_kernels'\]",
    ),
    "a hook that takes arguments": (
        KERNEL + "    @hookimpl\n    def lct_kernels(device):\n        return []",
        r"plugin 'lct_bad' of lct-bad 1\.2: PluginValidationError: .*device",
    ),
    "a crashing hook": (
        KERNEL + "    @hookimpl\n    def lct_kernels():\n        raise RuntimeError('no driver')",
        r"plugin 'lct_bad' of lct-bad 1\.2: RuntimeError: no driver",
    ),
    "a hook that returns nothing": (
        KERNEL + "    @hookimpl\n    def lct_kernels():\n        kernel('x')",
        r"plugin 'lct_bad' of lct-bad 1\.2: TypeError: 'NoneType' object is not iterable",
    ),
    "another type": (
        KERNEL + "    @hookimpl\n    def lct_kernels():\n        return [{'name': 'x'}]",
        r"plugin 'lct_bad' announces \{'name': 'x'\} as a kernel, expected a KernelSpec",
    ),
    "a kernel as a backbone": (
        KERNEL + "    @hookimpl\n    def lct_backbones():\n        return [kernel('x')]",
        r"plugin 'lct_bad' announces KernelSpec\(name='x'.* as a backbone, expected a BackboneSpec",
    ),
    "a kernel's name that is taken": (
        KERNEL + "    @hookimpl\n    def lct_kernels():\n        return [kernel('sdpa')]",
        r"kernel 'sdpa' is announced by plugins \['lct_bad', 'lct_core'\], but a name must be unique",
    ),
    "a name twice in one plugin": (
        KERNEL + "    @hookimpl\n    def lct_kernels():\n        return [kernel('x'), kernel('x')]",
        r"kernel 'x' is announced by plugins \['lct_bad', 'lct_bad'\], .* there are: \[.*'sdpa', 'x'\]",
    ),
    "the name auto": (
        KERNEL + "    @hookimpl\n    def lct_kernels():\n        return [kernel('auto')]",
        r"kernel 'auto' is announced by plugins \['lct_bad'\], but a name must be unique and not \"auto\"",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_plugin_is_named(case, install):
    code, message = BAD[case]
    install("lct-bad", code)
    with pytest.raises(PluginError, match=rf"(?s)^{message}" if message.startswith(("plugin", "kernel")) else message):
        installed()


def test_an_error_says_what_is_loaded_already(install):
    install("lct-bad", "1 / 0")
    entries = sorted(entry_points(group="lct"), key=lambda entry: entry.name == "lct_bad")
    with pytest.raises(PluginError, match=r"Loaded: \['lct_backbones', 'lct_core', 'lct_plugins'\]$") as caught:
        Registry(entries)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("value", ["no_such_module", "lct_toy:NoSuchPlugin"])
def test_an_entry_point_that_leads_nowhere(value, install):
    install("lct-toy", GOOD, value=value)
    with pytest.raises(PluginError, match=rf"^plugin 'lct_toy' \({value} of lct-toy 1\.2\) cannot be loaded: "):
        installed()


def test_two_distributions_that_take_one_name(install):
    install("lct-toy", GOOD)
    install("lct-other", GOOD)
    names = r"\['lct_other', 'lct_toy'\]"
    with pytest.raises(
        PluginError, match=rf"^backbone 'toy' is announced by plugins {names}, but a name must be unique"
    ):
        installed()


def test_two_distributions_with_one_entry_point_name(install):
    install("lct-toy", GOOD, entry="same")
    install("lct-other", KERNEL, entry="same")
    with pytest.raises(
        PluginError, match=r"^plugin 'same' of lct-(toy|other) 1\.2 is registered twice; loaded: \[.*'same'"
    ):
        installed()


@pytest.mark.parametrize("kernels", [[kernel("sdpa")], [kernel("auto")], [None], None])
def test_a_refused_plugin_leaves_the_registry_as_it_was(kernels):
    class Bad:
        @hookimpl
        def lct_backbones(self):
            return [backbone("half")]

        @hookimpl
        def lct_kernels(self):
            return kernels

    registry = Registry()
    registry.register(plugin(backbones=[backbone("before")]), name="before")
    kernels_before = registry.kernels
    for _ in range(2):
        with pytest.raises(PluginError):
            registry.register(Bad(), name="bad")
        assert registry.kernels == kernels_before
        assert list(registry.backbones) == ["before"]
    registry.register(plugin(kernels=[kernel("good")]), name="bad")  # the name is free again
    assert "good" in registry.kernels


def test_a_misspelt_hook_does_not_block_later_plugins():
    class Misspelt:
        @hookimpl
        def lct_kernal(self):
            return []

    registry = Registry()
    with pytest.raises(PluginError, match="lct_kernal"):
        registry.register(Misspelt(), name="bad")
    registry.register(plugin(kernels=[kernel("good")]), name="good")
    assert "good" in registry.kernels


def test_one_plugin_under_two_names():
    registry, one = Registry(), plugin(kernels=[kernel("good")])
    registry.register(one, name="one")
    with pytest.raises(PluginError, match=r"^plugin 'two': ValueError: Plugin"):
        registry.register(one, name="two")
    assert "good" in registry.kernels


# which backbone


class Base(torch.nn.Module):
    pass


class Derived(Base):
    pass


class MostDerived(Derived):
    pass


def adapted(model):
    return ("adapted", type(model).__name__)


def derived_adapted(model):
    return ("derived", type(model).__name__)


HERE = f"{__name__}:"


def test_the_most_derived_class_that_is_handled_decides():
    registry = Registry()
    families = [
        backbone("base", Base, adapter=f"{HERE}adapted"),
        backbone("derived", Derived, adapter=f"{HERE}derived_adapted"),
    ]
    registry.register(plugin(backbones=families), name="test")
    assert registry.adapter(Base()) == ("adapted", "Base")
    assert registry.adapter(Derived()) == ("derived", "Derived")
    assert registry.adapter(MostDerived()) == ("derived", "MostDerived")
    assert registry.adapter(MostDerived(), "base") == ("adapted", "MostDerived")
    assert registry.adapter(torch.nn.Identity(), "base") == ("adapted", "Identity")  # by name: whatever the class


def refusing(*specs):
    registry = Registry()
    for i, spec in enumerate(specs):
        registry.register(plugin(backbones=[spec]), name=f"test {i}")
    return registry


REFUSED = {Derived: "it attends to other frames than its own"}
MESSAGE = rf"^model: {__name__}.Derived cannot be served: it attends to other frames than its own$"


@pytest.mark.parametrize("model", [Derived, MostDerived])
def test_a_refused_class_is_not_taken_for_its_parent(model):
    registry = refusing(backbone("base", Base, adapter=f"{HERE}adapted", refuses=REFUSED))
    with pytest.raises(ValueError, match=MESSAGE):
        registry.adapter(model())
    assert registry.adapter(Base()) == ("adapted", "Base")


@pytest.mark.parametrize("first", [True, False])
def test_an_adapter_counts_whoever_else_refuses_the_class(first):
    specs = [backbone("no", refuses=REFUSED), backbone("yes", Base, Derived, adapter=f"{HERE}adapted")]
    registry = refusing(*specs if first else reversed(specs))
    assert registry.adapter(Derived()) == ("adapted", "Derived")  # somebody knows better


def test_a_class_below_a_refused_one_may_be_served():
    registry = refusing(backbone("one", Base, MostDerived, adapter=f"{HERE}adapted", refuses=REFUSED))
    assert registry.adapter(MostDerived()) == ("adapted", "MostDerived")
    with pytest.raises(ValueError, match=MESSAGE):
        registry.adapter(Derived())


def test_nothing_is_refused_by_default():
    assert not backbone("any").refuses
    assert BackboneSpec(name="any", summary="", handles=(), adapter="").support == ()


def test_two_backbones_for_one_class_need_a_name():
    registry = Registry()
    families = [
        backbone("one", Base, Derived, adapter=f"{HERE}adapted"),
        backbone("two", Base, adapter=f"{HERE}derived_adapted"),
    ]
    registry.register(plugin(backbones=families), name="test")
    with pytest.raises(ValueError, match=rf"^model: {__name__}.Base is handled by \['one', 'two'\]; choose one with"):
        registry.adapter(Base())
    assert registry.adapter(Derived()) == ("adapted", "Derived")
    assert registry.adapter(Base(), "two") == ("derived", "Base")


def test_a_model_that_nobody_handles():
    registry = Registry()
    registry.register(plugin(backbones=[backbone("one", Derived), backbone("two", MostDerived)]), name="test")
    expected = (
        rf"^model: no backbone handles {__name__}\.Base; there are:\n"
        rf"  one: {__name__}\.Derived\n  two: {__name__}\.MostDerived\nwrite an adapter"
    )
    with pytest.raises(ValueError, match=expected):
        registry.adapter(Base())


def test_unknown_names():
    registry = Registry()
    registry.register(plugin(backbones=[backbone("one", Base), backbone("two", build=f"{HERE}Derived")]), name="test")
    for call in (lambda: registry.adapter(Base(), "three"), lambda: registry.build("three")):
        with pytest.raises(ValueError, match=r"^backbone: got 'three', expected one of \['one', 'two'\]"):
            call()
    with pytest.raises(ValueError, match=r"^name: backbone 'one' adapts models but cannot make one"):
        registry.build("one")
    assert type(registry.build("two")) is Derived
