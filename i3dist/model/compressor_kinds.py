"""The compressors that `model.compressor` can name.

To add one, derive a class from `Compressor` and register it (docs/extending.md).
"""

from i3dist.model.compressor import Compressor
from i3dist.model.compressor_literal import LiteralCompressor
from i3dist.model.compressor_records import RecordsCompressor
from i3dist.registry import Registry

COMPRESSORS: Registry[type[Compressor]] = Registry("model.compressor")
COMPRESSORS.register("records")(RecordsCompressor)
COMPRESSORS.register("literal")(LiteralCompressor)
