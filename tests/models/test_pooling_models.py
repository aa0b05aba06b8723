"""What an engine makes of a model: from its arguments, config.json and the files of sentence-transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vjax.config.engine_args import EngineArgs
from vjax.errors import ConfigError, ModelLoadError
from vjax.models.pooling import resolve_model

CONFIG = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
EMBED = ("embed", "token_embed")
CLASSIFY = ("classify", "token_classify")


def resolve(architecture: str, folder, fields=None, **arguments) -> Any:
    args = EngineArgs(**arguments)
    config = {**CONFIG, "architectures": [architecture], **(fields or {})}
    return resolve_model(config, folder, runner=args.runner, convert=args.convert, pooler_config=args.pooler_config)


@pytest.mark.parametrize(
    ("architecture", "arguments", "head", "tasks", "width"),
    [
        ("LlamaForCausalLM", {}, "lm", None, 64),
        ("LlamaForCausalLM", {"task": "generate"}, "lm", None, 64),
        ("LlamaForCausalLM", {"runner": "pooling"}, "none", EMBED, 64),
        ("LlamaForCausalLM", {"convert": "embed"}, "none", EMBED, 64),
        ("LlamaForCausalLM", {"task": "embed"}, "none", EMBED, 64),
        ("LlamaForCausalLM", {"task": "reward"}, "none", ("token_classify",), 64),
        ("Qwen3ForCausalLM", {"convert": "classify"}, "score", CLASSIFY, 2),
        ("MistralModel", {}, "none", EMBED, 64),
        ("Qwen2ForSequenceClassification", {}, "score", CLASSIFY, 2),
        ("Qwen2ForSequenceClassification", {"task": "score"}, "score", CLASSIFY, 2),
        ("Qwen2ForRewardModel", {}, "score_mlp", ("token_classify",), 1),
        ("Qwen2ForProcessRewardModel", {"task": "reward"}, "score_mlp", ("token_classify",), 2),
        ("Qwen2Model", {"pooler_config": {"pooling_type": "ALL"}}, "none", EMBED[::-1], 64),
    ],
)
def test_head_and_tasks(tmp_path, architecture, arguments, head, tasks, width):
    arch, pooling = resolve(architecture, tmp_path, **arguments)
    assert (arch.architecture, arch.head) == (architecture, head)
    if tasks is None:
        assert pooling is None and arch.tie_word_embeddings
    else:
        assert (pooling.tasks, pooling.width, pooling.sequence_type) == (tasks, width, "LAST")
        step = architecture == "Qwen2ForProcessRewardModel"
        assert pooling.token_type == ("STEP" if step else "ALL") and not arch.tie_word_embeddings


@pytest.mark.parametrize(
    ("architecture", "fields", "labels", "activation"),
    [
        ("LlamaForSequenceClassification", {}, 2, "softmax"),
        ("LlamaForSequenceClassification", {"id2label": {"0": "a", "1": "b", "2": "c"}}, 3, "softmax"),
        ("LlamaForSequenceClassification", {"id2label": {"0": "a"}}, 1, "sigmoid"),
        ("LlamaForSequenceClassification", {"num_labels": 1, "problem_type": "regression"}, 1, "none"),
        ("LlamaForSequenceClassification", {"problem_type": "multi_label_classification"}, 2, "sigmoid"),
        (
            "Qwen3ForSequenceClassification",
            {"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            1,
            "none",
        ),
        ("Qwen2ForRewardModel", {"num_labels": 7}, 1, "none"),
        ("Qwen2ForProcessRewardModel", {}, 2, "softmax"),
    ],
)
def test_labels_and_activation(tmp_path, architecture, fields, labels, activation):
    arch, pooling = resolve(architecture, tmp_path, fields)
    assert (arch.num_labels, pooling.activation, "score" in pooling.tasks) == (
        labels,
        activation,
        labels == 1 and "classify" in pooling.tasks,
    )


@pytest.mark.parametrize(
    ("pooling_config", "pooling_type"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False, "include_prompt": True}, "LAST"),
        ({"pooling_mode_mean_tokens": True}, "MEAN"),
        ({"pooling_mode": "cls"}, "CLS"),
    ],
)
def test_sentence_transformers(tmp_path, pooling_config, pooling_type):
    for folder, kind in [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]:
        (tmp_path / folder).mkdir(exist_ok=True)
        modules = [] if not folder else json.loads((tmp_path / "modules.json").read_text())
        modules.append({"path": folder, "type": f"sentence_transformers.models.{kind}"})
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / "1_Pooling").mkdir(exist_ok=True)
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling_config))
        arch, pooling = resolve("Qwen3ForCausalLM", tmp_path)
        if folder == "":
            assert pooling is None
        else:
            assert (arch.head, pooling.sequence_type) == ("none", pooling_type)
            assert pooling.use_activation == (kind == "Normalize")
    _, pooling = resolve("Qwen3ForCausalLM", tmp_path, pooler_config={"pooling_type": "MEAN", "normalize": False})
    assert (pooling.sequence_type, pooling.use_activation) == ("MEAN", False)
    assert resolve("Qwen3ForCausalLM", tmp_path, runner="generate")[1] is None


def test_what_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="is_causal is false"):
        resolve("Qwen2Model", tmp_path, {"is_causal": False})
    with pytest.raises(ModelLoadError, match=r"activation 'torch.nn.modules.activation.Tanh'; supported are Identity"):
        fields = {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"}
        resolve("LlamaForSequenceClassification", tmp_path, fields)
    with pytest.raises(ConfigError, match="task='embed' stands for runner and convert"):
        resolve("LlamaModel", tmp_path, task="embed", runner="pooling")
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"modules.json holds a dict; a list is needed"):
        resolve("LlamaModel", tmp_path)
