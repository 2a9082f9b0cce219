"""What can go wrong in a pipeline.

```
ReduxError
├── RequestError   the caller asked for something that cannot be done; the text says what can
├── ImageError     bytes that are not a usable picture
├── AttentionError no attention that was asked for, or none at all, can be used here
├── MemoryPlanError  a card is too small for a model, however its weights are placed
└── WeightsError   a checkpoint is missing, incomplete or of the wrong kind
```
"""


class ReduxError(Exception):
    """Base of all errors this package raises on purpose. Its text is fit to be shown to a user."""


class RequestError(ReduxError, ValueError):
    """A request that this pipeline cannot serve as it stands."""


class ImageError(ReduxError, ValueError):
    """Bytes that are not a usable picture."""


class WeightsError(ReduxError):
    """A checkpoint that is missing, incomplete or of the wrong kind."""


class MemoryPlanError(ReduxError):
    """A card that is too small for a model, however its weights are placed."""


class AttentionError(ReduxError):
    """No attention that was asked for, or none at all, can be used on a device; says why each."""
