"""Every error that rmfx raises on purpose, one line of meaning each."""


class RmfxError(Exception):
    """Base of all rmfx errors: catch this to catch them all."""


class UnsupportedModelError(RmfxError):
    """The model as a whole cannot be converted (training mode, quantised, several devices, ...)."""


class TraceError(RmfxError):
    """The model's Python code cannot be followed; names the file and line."""


class NormalFormError(RmfxError):
    """A graph is not, or cannot be brought, into the normal form that passes rely on."""


class InexactError(RmfxError):
    """An algebraic step whose exactness condition does not hold; ``str(error)`` is the condition.

    Internal to planning: passes turn it into a :class:`rmfx.graph.rule.Refusal`.
    """


class VerificationError(RmfxError):
    """Original and converted model differ; names the first surviving layer that does."""


class NotPlainError(RmfxError):
    """The network is not a plain chain; names the first tensor with two readers."""


class FileFormatError(RmfxError):
    """A saved network is damaged, hostile, or of an unknown version."""


class ExportError(RmfxError):
    """The ONNX file could not be made, or does not compute what the network computes."""


class OnnxImportError(RmfxError):
    """An ONNX file cannot be read as a torch network; names the node and the operator."""


class RuntimeUnavailableError(RmfxError):
    """An execution provider or device was asked for and is not active here."""


class ModelNameError(RmfxError):
    """A model named on the command line cannot be built or its weights cannot be loaded."""


class DivergedError(RmfxError):
    """While training, the loss is no finite number any more."""


class PartialConversionWarning(UserWarning):
    """Only parts of a model were converted: its code as a whole cannot be followed. The report lists what was left."""


class PriceCacheWarning(RuntimeWarning):
    """Measured prices cannot be kept on disk, and are forgotten when the program ends."""


class PlanError(RmfxError):
    """A plan cannot be read, or does not fit the model it is applied to; the message names the place."""
