"""The names of the transformers library over gptjax's functions, for prototypes.

Thin: the tokenizer is `data.tokenizer`, the model `nn` and `infer`, training `train.loop.fit`, files
`checkpoint.store`. Whatever one of these classes wrote, everything else in gptjax reads.
"""

from gptjax.api.arguments import TrainingArguments
from gptjax.api.compress import knowledge_distillation, prune_model, quantize_model
from gptjax.api.model import GPT4LMHeadModel
from gptjax.api.text import DataCollatorForLanguageModeling, GPT4Tokenizer, TextDataset
from gptjax.api.trainer import Trainer

__all__ = [
    "DataCollatorForLanguageModeling",
    "GPT4LMHeadModel",
    "GPT4Tokenizer",
    "TextDataset",
    "Trainer",
    "TrainingArguments",
    "knowledge_distillation",
    "prune_model",
    "quantize_model",
]
