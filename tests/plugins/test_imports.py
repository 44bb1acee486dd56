"""What importing the library loads and changes."""

import json
import subprocess
import sys
from textwrap import dedent


def in_a_new_process(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", dedent(code)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_listing_imports_no_model_library_and_no_kernel(tmp_path):
    code = """
        import json, sys
        import lct_core as lct
        from lct_core import *
        before = set(sys.modules)
        names = list(lct.registry().backbones), list(lct.registry().kernels)
        print(json.dumps([names, sorted(sys.modules.keys() - before), sorted(sys.modules)]))
    """
    (backbones, kernels), new, loaded = in_a_new_process(code, tmp_path)
    assert "mmdit" in backbones
    assert {"sdpa", "reference", "flex", "flash3", "triton"} <= set(kernels)
    for library in (
        "diffusers",
        "timm",
        "transformers",
        "triton",
        "xformers",
        "flash_attn",
        "matplotlib",
        "hypothesis",
    ):
        assert library not in loaded
    assert "lct_backbones.mmdit" not in loaded
    assert "torch.nn.attention.flex_attention" not in loaded
    third_party = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
    assert third_party == {"lct_core", "lct_backbones", "lct_plugins"}


def test_importing_the_library_loads_little(tmp_path):
    code = """
        import json, sys
        import torch, einops, pluggy, jaxtyping
        before = set(sys.modules)
        from lct_core import *
        print(json.dumps(sorted(sys.modules.keys() - before)))
    """
    new = in_a_new_process(code, tmp_path)
    assert {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names) == {"lct_core"}
    for optional in ("testing", "demo", "data", "cli", "training"):
        assert f"lct_core.{optional}" not in new


def test_importing_the_library_changes_no_global_state(tmp_path):
    code = """
        import json, os, sys, warnings
        import torch, einops, pluggy, jaxtyping

        def state():
            flags = torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision()
            switches = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
            backends = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
            python = dict(os.environ), os.listdir(), len(warnings.filters), sys.path
            return [*map(str, flags), switches, backends, torch.get_rng_state().tolist(), python]

        before = json.dumps(state())
        torch.manual_seed(5)
        changes = json.dumps(state()) != before
        before = json.dumps(state())
        from lct_core import *
        print(json.dumps([changes, json.dumps(state()) == before]))
    """
    assert in_a_new_process(code, tmp_path) == [True, True]
