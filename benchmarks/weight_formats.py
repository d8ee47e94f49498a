"""What weights in fewer bits cost a real model: perplexity of each format, against the file's own numbers in bfloat16.

    make models
    python benchmarks/weight_formats.py --text DATA/wikitext2 --record benchmarks/results/weight_formats.jsonl

`int4` takes the blocks of the file over where they have 4 bits; `int4 again` rounds the decoded numbers, as it must be
done with any other checkpoint. SmolLM2 is also written as Q4_0, from its own Q4_1, because that is the format which
rounding again does not find back; only its ratios mean something. Dense attention, layer by layer, bfloat16 rows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import gguf
import torch
from gguf.quants import dequantize, quantize
from real_models import SMOLLM2
from recording import tell
from weight_makers import CPU, FORMATS, fetched_models, maker

from alisa import LLM
from alisa.config import EngineConfig
from alisa.engine.loaded import LoadedModel
from alisa.kernels.choose import choose_backend
from alisa.lab.bench.stamp import current_stamp
from alisa.lab.eval.perplexity import perplexity_of
from alisa.lab.eval.subject import BASELINE, Subject
from alisa.model.stored import open_model


@contextmanager
def as_q4_0(path: Path) -> Iterator[Path]:
    """The file with its matrices of 4 bits as Q4_0, for as long as it is needed."""
    reader = gguf.GGUFReader(path)
    with tempfile.TemporaryDirectory() as directory:
        written = Path(directory) / path.name.replace("Q4_1", "Q4_0")
        writer = gguf.GGUFWriter(written, str(reader.fields["general.architecture"].contents()))
        for name, field in reader.fields.items():
            if not name.startswith(("GGUF.", "general.architecture")):
                of_elements = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], sub_type=of_elements)
        for tensor in reader.tensors:
            values, kind = tensor.data, tensor.tensor_type
            if kind is gguf.GGMLQuantizationType.Q4_1:
                kind = gguf.GGMLQuantizationType.Q4_0
                values = quantize(dequantize(values, tensor.tensor_type), kind)
            writer.add_tensor(tensor.name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        yield written


def measure(path: Path, text: Path, windows: int, record: Path | None) -> None:
    """One line for each format of a file."""
    stored = open_model(path)
    tokenizer = stored.tokenizer()
    baseline: list[float] = []
    for name in FORMATS:
        began = perf_counter()
        decoder = stored.decoder(torch.bfloat16, CPU, linears=maker(name))
        loaded_s = perf_counter() - began
        model = LoadedModel(path.name, decoder, tokenizer, choose_backend(CPU))
        with LLM(config=EngineConfig(policy="dense"), loaded=model) as llm:
            subject = Subject.of(llm)
            evaluation = perplexity_of(subject, text, context=2048, prefill=512, num_windows=windows, mode="layerwise")
            units = evaluation.measure(subject, BASELINE).units
        baseline = baseline or units
        value, versus = evaluation.value(units), evaluation.versus(units, baseline)
        tell(
            {
                "benchmark": "weight_formats",
                "model": path.name,
                "task": evaluation.task,
                "weights": name,
                "perplexity": value.value,
                "standard_error": value.standard_error,
                "versus": versus.value,
                "versus_error": versus.standard_error,
                "units": units,
                "weight_bytes": decoder.weight_bytes,
                "weights_s": loaded_s,
                "settings": dict(evaluation.settings),
                "stamp": asdict(current_stamp()),
            },
            record,
        )


def main() -> None:
    """Measure, print, and append the records to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text, or a directory with its test split")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--record", type=Path, help="append the records to this file")
    args = parser.parse_args()
    for model in fetched_models():
        measure(model.path, args.text, args.windows, args.record)
    with as_q4_0(SMOLLM2.path) as path:
        measure(path, args.text, args.windows, args.record)


if __name__ == "__main__":
    main()
