"""Training callbacks: warm starts, hidden-state cache, answers to held-out samples, protocols."""

from nextgpt.callbacks.hidden_state_cache import HiddenStateCache, caches_hidden_states
from nextgpt.callbacks.protocol_evaluation import ProtocolEvaluation
from nextgpt.callbacks.validation_samples import ValidationSamples
from nextgpt.callbacks.warm_start import LeastSquaresInit, WhiteningInit
from nextgpt.common.distributed import print_rank_0
from nextgpt.config.schema import Config
from nextgpt.training.trainer import TrainerCallback


def build_callbacks(config: Config) -> list[TrainerCallback]:
    """The callbacks that the configuration switches on, in the order in which they run.

    Raises:
        UserError: hidden states are to be cached, but the language model's inputs train; or no
            protocol is named to evaluate.
    """
    callbacks: list[TrainerCallback] = []
    if config.input_projection.init == "least_squares":
        callbacks.append(LeastSquaresInit())
    cache = None
    if caches_hidden_states(config.training):
        cache = HiddenStateCache(config.training)
        callbacks.append(cache)
    elif config.training.cache_hidden_states:
        print_rank_0("training.cache_hidden_states: off, one epoch needs no state twice")
    if config.output_projection.whiten_inputs:
        callbacks.append(WhiteningInit(cache))
    if config.training.validation_samples:
        callbacks.append(ValidationSamples(config.training.validation_samples))
    if config.training.evaluate_every is not None:
        callbacks.append(ProtocolEvaluation(config))
    return callbacks
