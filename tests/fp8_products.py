"""Whether this torch multiplies in fp8 on a CPU, which is where most tests of fp8 run."""

import pytest
import torch

from redux_pipelines.fp8.self_test import hardware_refusal

REFUSAL = hardware_refusal(torch.device("cpu"))
needs_fp8 = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
