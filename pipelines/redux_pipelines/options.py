"""How a checkpoint is to be run: where, in which precision, by which implementations.

Plain values with the words of the settings; what each one may be is checked by whoever uses it.
Imports no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What ``load_pipeline`` takes beside the model.

    ``backend`` is what runs the transformer: ``engine``, or ``diffusers``, the reference that it is
    tested against. ``device`` auto: cuda where there is one. ``dtype`` auto: bfloat16 on cuda, else
    float32. ``transformer_dtype`` auto: as the checkpoint is, where the device can; same: as
    ``dtype``; fp8: large layers in e4m3, quantised while they load if need be (approximate).
    ``attention`` auto: the engine's first that passes its self-test; or the names of those that may
    be taken, in order, separated by commas (``attention_choice.NAMES``). ``max_batch_size`` images
    are denoised together. ``quality`` is the tier of requests that name none: ``exact``,
    ``balanced`` or ``fast``; the last two reuse steps' work, need the engine, and were tuned on
    ``mini`` only. ``memory`` is where weights live: ``auto`` (the fastest of the others that fits
    the GPU), ``resident``, ``evict`` or ``offload``, see ``redux_pipelines.memory``.
    """

    backend: str = "engine"
    device: str = "auto"
    dtype: str = "auto"
    transformer_dtype: str = "auto"
    attention: str = "auto"
    quality: str = "exact"
    max_batch_size: int = 1
    memory: str = "auto"
