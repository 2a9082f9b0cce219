"""Makes the modules of a checkout of ComfyUI's WaveSpeed nodes importable without ComfyUI.

What they import of ComfyUI, and for sound and film, is stood in for by empty modules: those of
pictures call none of it, but to make a tensor at the end.
"""

import sys
import types


def make_importable(source):
    for name in ("comfy_api", "comfy_api.input", "torchaudio", "av", "torch"):
        sys.modules.setdefault(name, types.ModuleType(name))
    for name in ("ImageInput", "AudioInput", "VideoInput"):
        setattr(sys.modules["comfy_api.input"], name, object)
    sys.path.insert(0, source)
