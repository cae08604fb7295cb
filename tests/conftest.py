import os
import sys
from pathlib import Path

import pytest

# Idle threads sleep instead of spinning: small tensors on a busy machine run several times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_configure(config):
    # torch.func's own, on its first use.
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script. is deprecated")


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """A T5 of random weights in transformers' layout: width 16, words for tokens, "</s>" last."""
    pytest.importorskip("transformers", reason="T5 is optional: pip install transformers")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    folder = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "chair", "table", "with", "legs"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>",
                                                             special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2,
                            num_heads=2)).save_pretrained(folder)
    return folder
