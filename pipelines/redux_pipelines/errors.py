"""What can go wrong in a pipeline.

```
ReduxError
├── RequestError   the caller asked for something that cannot be done; the text says what can
├── ImageError     bytes that are not a usable picture
├── OutputError    the model made numbers that are no picture
├── DeviceMemoryError  not even one image of a request fits into the device's memory
├── DeviceError    the device can be used by no one in this process any more
├── AttentionError no attention that was asked for, or none at all, can be used here
├── MemoryPlanError  a card is too small for a model, however its weights are placed
└── WeightsError   a checkpoint is missing, incomplete or of the wrong kind
    └── WeightsAway  the same, for now: another try may find it
```
"""


class ReduxError(Exception):
    """Base of all errors this package raises on purpose. Its text is fit to be shown to a user."""


class RequestError(ReduxError, ValueError):
    """A request that this pipeline cannot serve as it stands."""


class ImageError(ReduxError, ValueError):
    """Bytes that are not a usable picture."""


class OutputError(ReduxError):
    """What the model made is no picture: it holds numbers that are not finite."""


class DeviceMemoryError(ReduxError):
    """Not even one image of what was asked for fits into the device's memory."""


class DeviceError(ReduxError):
    """The device failed in a way that only a new process recovers from.

    After a failed assertion or an illegal access every later call fails too, whoever makes it.
    """


class WeightsError(ReduxError):
    """A checkpoint that is missing, incomplete or of the wrong kind."""


class WeightsAway(WeightsError):
    """A checkpoint that cannot be had now, because of a network or a disk: it may be had later."""


class MemoryPlanError(ReduxError):
    """A card that is too small for a model, however its weights are placed."""


class AttentionError(ReduxError):
    """No attention that was asked for, or none at all, can be used on a device; says why each."""
