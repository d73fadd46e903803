"""Limbeck turns large language models into small, fast ones, and proves what was gained.

Importing the package is light: nothing of torch or transformers is loaded. As soon as transformers' Auto classes are
loaded, by whoever, Limbeck's models and tokenizer are registered with them, so that
`AutoModelForCausalLM.from_pretrained(folder)` works after `import limbeck`.
"""

from wrapt import when_imported

__version__ = "0.1.0"


@when_imported("transformers.models.auto.configuration_auto")
def _register_config(_module: object) -> None:
    import limbeck.models.byte_pool_config
    import limbeck.models.compact_config
    import limbeck.models.config  # noqa: F401  (they register themselves)


@when_imported("transformers.models.auto.modeling_auto")
def _register_model(_module: object) -> None:
    import limbeck.models.byte_pool
    import limbeck.models.compact
    import limbeck.models.hybrid  # noqa: F401  (they register themselves)


@when_imported("transformers.models.auto.tokenization_auto")
def _register_tokenizer(_module: object) -> None:
    import limbeck.models.byte_tokenizer  # noqa: F401  (registers itself)
