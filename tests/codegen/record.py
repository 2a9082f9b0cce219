"""The record that test_codegen.py and test_sizes.py hold FLUX's blocks to, written anew by

    PYTHONPATH=pipelines:kernels:weights python tests/codegen/record.py

``... record.py NAME`` prints the code counts of one network as JSON: in a process of its own, for
it changes what torch believes of this machine. A network is a function in ``networks``.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RECORD = HERE / "codegen.json"
COMPILERS = ("g++", "c++", "clang++")

# no packages: no ``import tests``
sys.path += map(str, (HERE.parent, HERE.parent / "kernels", ROOT / "kernels" / "benchmarks"))

import torch  # noqa: E402

from codegen import networks, sizes  # noqa: E402

NETWORKS: dict[str, tuple[Callable[..., networks.Network], int]] = {
    "diffusers": (networks.diffusers_network, networks.TEXT),
    "operators": (networks.operators_network, networks.TEXT),
    "ours": (networks.our_network, networks.TEXT),
    "ours, folded": (networks.our_network, networks.FOLDED_TEXT),
}
FEW = (1, 1)
KINDS = {"double": (2, 1), "single": (1, 2)}
"""A block costs what a network with one more of its kind costs more than one with one of each.

That is known only of networks that are one graph: between graphs torch runs what is not counted.
"""


def find_compiler() -> str | None:
    """A C++ compiler, which the absent GPU needs."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def counted(name: str) -> dict[str, Any]:
    """The code counts of one network, from a process of its own."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("pipelines", "kernels", "weights"))
    command = [sys.executable, "-W", "ignore", str(Path(__file__)), name]
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _count(name: str) -> dict[str, Any]:
    """Count here; for a process of its own."""
    from codegen import absent_gpu

    compiler = find_compiler()
    assert compiler, "no C++ compiler"
    absent_gpu.install(compiler)
    networks.make_attention_opaque()
    _generated(name, *FEW)  # Inductor knows an operator as such once it has met it: not counted
    least, *more = (_generated(name, *blocks) for blocks in (FEW, *KINDS.values()))
    every = [code for codes in (least, *more) for code in codes]
    graphs = max(map(len, (least, *more)))
    result: dict[str, Any] = {"graphs": graphs, "float64": any(code.uses_float64 for code in every)}
    for kind, codes in zip(KINDS, more, strict=True):
        result[kind] = _difference(codes[0], least[0]) if graphs == 1 else None
    return result


def _generated(name: str, doubles: int, singles: int) -> list[Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from codegen.generated import generate

    network, text = NETWORKS[name]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        function, tensors = network(doubles, singles, networks.Maker("cuda"), text)
        return generate(function, *tensors)


def _difference(larger: Any, smaller: Any) -> dict[str, int]:
    most, least = _numbers(larger), _numbers(smaller)
    return {key: most[key] - least[key] for key in most}


def _numbers(code: Any) -> dict[str, int]:
    calls = Counter(code.calls)
    return {
        "launches": code.launches,
        "products": calls.pop("addmm", 0) + calls.pop("mm", 0),
        "attentions": calls.pop("redux_tests.attention", 0) + calls.pop("redux_tests.attend", 0),
        "other_calls": calls.total(),
        "size_bytes": code.size_bytes,
    }


def main() -> None:
    if sys.argv[1:]:
        print(json.dumps(_count(sys.argv[1])))
        return
    record = {
        "torch": torch.__version__.partition("+")[0],
        "code": {name: counted(name) for name in NETWORKS},
        "sizes": {name: measure() for name, measure in sizes.MEASURED.items()},
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
