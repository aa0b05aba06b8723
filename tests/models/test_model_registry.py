"""Architectures that users register from outside the package."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

import vjax
from vjax.engine import builder
from vjax.errors import ModelLoadError
from vjax.models import registry
from vjax.models.llama import LlamaForCausalLM
from vjax.models.registry import ModelRegistry, arch_config_from_hf, get_model_class, supported_architectures

CONFIG = {
    "architectures": ["OwnForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
}


class OwnForCausalLM(LlamaForCausalLM):
    pass


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What is registered; it was empty before, and is afterwards."""
    monkeypatch.setattr(registry, "_registered", {})


def test_it_is_public():
    assert vjax.ModelRegistry is ModelRegistry


def test_a_class():
    with pytest.raises(
        ModelLoadError, match=r"'OwnForCausalLM' is not supported.*ModelRegistry.register_model adds one"
    ):
        arch_config_from_hf(CONFIG)
    ModelRegistry.register_model("OwnForCausalLM", OwnForCausalLM)
    assert get_model_class(arch_config_from_hf(CONFIG)) is OwnForCausalLM
    assert supported_architectures()[-1] == "OwnForCausalLM"
    assert ModelRegistry.get_supported_archs() == {*registry.MODELS, *registry.POOLING_MODELS, "OwnForCausalLM"}


def test_one_of_vjaxs_own_is_replaced(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vjax"), "propagate", True)
    ModelRegistry.register_model("LlamaForCausalLM", OwnForCausalLM)
    assert "architecture LlamaForCausalLM was there already" in caplog.text
    arch = arch_config_from_hf(CONFIG | {"architectures": ["LlamaForCausalLM"]})
    assert get_model_class(arch) is OwnForCausalLM
    assert supported_architectures() == [*registry.MODELS, *registry.POOLING_MODELS]


def test_a_name_is_imported_when_it_is_needed(tmp_path, monkeypatch):
    (tmp_path / "own_model_of_a_test.py").write_text(
        "from vjax.models.llama import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    ModelRegistry.register_model("OwnForCausalLM", "own_model_of_a_test:Own")
    assert "own_model_of_a_test" not in sys.modules
    model = get_model_class(arch_config_from_hf(CONFIG))
    assert model is sys.modules.pop("own_model_of_a_test").Own


@pytest.mark.parametrize("name", ["no_such_module:Own", "vjax.models.llama:Own", "vjax.models.arch:ArchConfig"])
def test_a_name_that_leads_nowhere(name):
    ModelRegistry.register_model("OwnForCausalLM", name)
    with pytest.raises(ModelLoadError, match=rf"'OwnForCausalLM' was registered as .*{name.partition(':')[2]}"):
        arch_config_from_hf(CONFIG)


@pytest.mark.parametrize(
    ("model_arch", "model_cls", "error"),
    [
        (OwnForCausalLM, OwnForCausalLM, TypeError),
        ("OwnForCausalLM", object, TypeError),
        ("OwnForCausalLM", OwnForCausalLM.arch_config, TypeError),
        ("OwnForCausalLM", "own_model.Own", ValueError),
        ("OwnForCausalLM", ":Own", ValueError),
        ("OwnForCausalLM", "own_model:Own:1", ValueError),
    ],
)
def test_what_cannot_be_registered(model_arch, model_cls, error):
    with pytest.raises(error, match=r"model_arch is|model_cls is|is no subclass of"):
        ModelRegistry.register_model(model_arch, model_cls)
    assert supported_architectures() == [*registry.MODELS, *registry.POOLING_MODELS]


def test_its_programs_are_lowered_in_the_engines_process(monkeypatch):
    """A worker process would not know the class, and a change of its sources would not change the name on disk."""
    monkeypatch.setattr(builder.StepDescription, "of", lambda *_: pytest.fail("programs were to be lowered elsewhere"))
    ModelRegistry.register_model("OwnForCausalLM", OwnForCausalLM)
    step = SimpleNamespace(model=SimpleNamespace(arch=arch_config_from_hf(CONFIG)))
    executables = SimpleNamespace(platform="gpu", mesh=SimpleNamespace(size=1), step=step)
    assert isinstance(builder._lowered_elsewhere(cast(Any, executables)), nullcontext)
