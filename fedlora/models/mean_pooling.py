"""A text classifier for transformers: an encoder, the mean over its tokens, a linear head.

This file needs torch and transformers only. fedlora copies it beside the weights of a merged
classifier and into the adapter directory of an encoder, because no class of transformers computes
this function. ``AutoModelForSequenceClassification`` and ``pipeline`` run it with the reader's
consent (``trust_remote_code=True``) and otherwise refuse to open the directory.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_MAPPING


class MeanPoolingConfig(PreTrainedConfig):
    """A classifier's configuration.

    transformers knows no model of this type, so that it opens none without this file.

    Args:
        encoder: The encoder's own configuration as a dictionary, with its ``model_type``.
    """

    model_type = "mean-pooling-classifier"

    encoder: dict[str, Any] | None = None


def mean(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over tokens ``(b, hidden)`` of ``(b, t, hidden)``; the mask is 0 at padding."""
    if attention_mask is None:
        return hidden.mean(1)
    mask = attention_mask.to(hidden.dtype)[..., None]  # (b, t, 1)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def without_pooler(config: Any) -> dict[str, bool]:
    """The argument that leaves out the unused pooler of BERT and its relatives."""
    encoder: Any = MODEL_MAPPING[type(config)]
    known = "add_pooling_layer" in inspect.signature(encoder.__init__).parameters
    return {"add_pooling_layer": False} if known else {}


class MeanPoolingClassifier(PreTrainedModel):
    """An encoder, the mean over its tokens, a linear head: token ids ``(b, t)`` to logits.

    The encoder is stored under the name that its own family uses (``bert``, ``roberta``,
    ``model``). Mean and head are float32 whatever the encoder is.

    Args:
        config: The classifier's configuration.
        encoder: A loaded encoder; without it a fresh one is built, for ``from_pretrained`` to fill.
    """

    config_class = MeanPoolingConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True  # the encoder decides

    def __init__(self, config: MeanPoolingConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self._keep_in_fp32_modules_strict = {"classifier"}
        if encoder is None:
            inner: Any = AutoConfig.for_model(**cast(dict[str, Any], config.encoder))
            encoder = AutoModel.from_config(inner, trust_remote_code=False, **without_pooler(inner))
        else:
            for module in encoder.modules():  # otherwise post_init draws new weights for some
                cast(Any, module)._is_hf_initialized = True
        assert encoder is not None
        self.base_model_prefix = encoder.base_model_prefix
        setattr(self, self.base_model_prefix, encoder)
        width, classes = encoder.config.hidden_size, cast(int, config.num_labels)
        self.classifier = nn.Linear(width, classes, dtype=torch.float32)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: encoder and head are loaded."""

    @classmethod
    def from_base(cls, base: str, labels: Sequence[str], **options: Any) -> "MeanPoolingClassifier":
        """A base model with a head for these classes, to which an adapter is then added.

        Args:
            base: Directory or hub name of an encoder.
            labels: Class names in index order.
            options: Arguments of ``AutoModel.from_pretrained``.
        """
        about, _ = PreTrainedConfig.get_config_dict(base)
        if about.get("model_type") == MeanPoolingConfig.model_type:  # merged: it has its head
            if (quantized := options.get("quantization_config")) is not None:
                quantized.llm_int8_skip_modules = ["classifier"]  # it is trained
            return cls.from_pretrained(base, trust_remote_code=False, **options).eval()
        inner: Any = AutoConfig.from_pretrained(base, trust_remote_code=False)
        encoder: Any = AutoModel.from_pretrained(
            base, trust_remote_code=False, **without_pooler(inner), **options
        )
        model = cls(configuration(encoder.config, labels), encoder)
        nn.init.zeros_(model.classifier.weight)
        nn.init.zeros_(model.classifier.bias)
        return model.eval()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **encoder_inputs: Any,
    ) -> SequenceClassifierOutput:
        """Logits ``(b, num_labels)`` float32; ``attention_mask`` ``(b, t)`` is 0 at padding.

        With ``labels``, class indices ``(b,)``, also their mean cross-entropy in nats.
        """
        encoder = getattr(self, self.base_model_prefix)
        given = {name: value for name, value in encoder_inputs.items() if value is not None}
        output = encoder(input_ids=input_ids, attention_mask=attention_mask, **given)
        logits = self.classifier(mean(output[0].float(), attention_mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def configuration(encoder: PreTrainedConfig, labels: Sequence[str]) -> MeanPoolingConfig:
    """The configuration of a classifier of this encoder with these classes, in index order."""
    described = encoder.to_dict()
    described.pop("_name_or_path", None)  # a directory of this machine
    return MeanPoolingConfig(
        encoder=described,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )


MeanPoolingConfig.register_for_auto_class()
MeanPoolingClassifier.register_for_auto_class("AutoModelForSequenceClassification")
