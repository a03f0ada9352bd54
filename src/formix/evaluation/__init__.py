"""What a pretrained model is worth, measured without training it."""

from formix.evaluation.perplexity import perplexity
from formix.evaluation.probe import image_features, linear_probe
from formix.evaluation.sentences import sentence_embeddings, sts_spearman

__all__ = ["image_features", "linear_probe", "perplexity", "sentence_embeddings", "sts_spearman"]
