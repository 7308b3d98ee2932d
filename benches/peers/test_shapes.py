"""The copies that the scripts make, checked without torch: python3 -m unittest discover benches/peers"""

import json
import unittest
from collections import Counter
from pathlib import Path

from shapes import MODELS, Pair, parameters

PRESETS = Path(__file__).resolve().parents[2] / "crates/cli/presets"
SIZES = (1, 2, 4)


def elements(offset: int, strides: tuple, shape: tuple) -> list[int]:
    return [
        offset + a * strides[0] + b * strides[1] + c * strides[2]
        for a in range(shape[0])
        for b in range(shape[1])
        for c in range(shape[2])
    ]


class Shapes(unittest.TestCase):
    def test_every_element_is_written_once_and_from_inside(self):
        for source_tp in SIZES:
            for target_tp in SIZES:
                for parameter in parameters(MODELS["tiny"]):
                    rows, cols = parameter.target_shape(target_tp)
                    held = parameter.source_shape(source_tp)
                    for target in range(target_tp):
                        written = Counter()
                        for source in range(source_tp):
                            for piece in parameter.pieces(source, source_tp, target, target_tp):
                                read = elements(piece.source_offset, piece.source_strides, piece.shape)
                                self.assertTrue(0 <= min(read) and max(read) < held[0] * held[1], parameter.name)
                                written.update(elements(piece.target_offset, piece.target_strides, piece.shape))
                        real = rows
                        if parameter.role == "vocab":
                            real = max(0, min(rows, parameter.rows - target * rows))
                        self.assertEqual(written, Counter(range(real * cols)), parameter.name)

    def test_models_are_those_of_the_presets(self):
        for model in MODELS.values():
            preset = PRESETS / f"{model.name}.json"
            if not preset.exists():
                continue
            config = json.loads(preset.read_text())
            names = "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim"
            found = [config[name] for name in names.split()] + [config["vocab_size"], config["tie_word_embeddings"]]
            want = [model.layers, model.hidden, model.intermediate, model.heads, model.kv_heads, model.head_dim]
            self.assertEqual(found, want + [model.vocab, model.tied], model.name)

    def test_two_gpus_cross_matched_pulls(self):
        pair = Pair(2, 2, 2)
        self.assertEqual([pair.source_gpu(0), pair.source_gpu(1)], [0, 1])
        self.assertEqual(pair.target_gpus(), [1, 0])
        self.assertEqual(Pair(2, 2, 4).target_gpus(), [2, 3])
        self.assertEqual(Pair(1, 1, 2).target_gpus(), [1])

    def test_what_cannot_be_run_is_said(self):
        tiny = MODELS["tiny"]
        self.assertIsNone(Pair(2, 4, 4).problem(tiny))
        self.assertIn("GPUs", Pair(4, 1, 2).problem(tiny))
        self.assertIn("TP8", Pair(8, 1, 8).problem(tiny))

    def test_sizes_are_those_of_the_real_models(self):
        for name, most in (("qwen3-4b", 4.03e9), ("qwen3-8b", 8.2e9)):
            count = sum(rows * cols for rows, cols in (p.target_shape(1) for p in parameters(MODELS[name])))
            self.assertTrue(0.99 * most < count < most, (name, count))


if __name__ == "__main__":
    unittest.main()
