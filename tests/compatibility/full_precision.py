"""The bundled model's GGUF with 32-bit weights: llama.cpp then computes what vLLM does, and answers can be compared.

From the 4-bit file llama.cpp answers some questions otherwise, for it rounds activations, too.
"""

from pathlib import Path

import gguf
import numpy as np

from deploy.model.model import wheel_file

_WRITERS_OWN = ("general.architecture", "general.file_type")


def full_precision(target: Path) -> Path:
    """Writes it to `target` (540 MB), unless it is there."""
    if target.exists():
        return target
    source, part = gguf.GGUFReader(str(wheel_file())), target.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), "llama")
    for name, field in source.fields.items():
        if name.startswith("GGUF.") or name in _WRITERS_OWN:
            continue
        if field.types[0] is gguf.GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)
    return target
