"""Every method the service offers. One row a method; adding one is this row, its parameters and one file.

No torch here: `path` is imported by whoever runs the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models import classic_params, classifier_params, generative_params, params, spatial_params
from models.errors import UnknownName

Kind = Literal["embedding", "relation", "classifier"]
Features = Literal["pooled", "spatial"]


@dataclass(frozen=True)
class Method:
    """One catalog row.

    path: 'module:Class' of the implementation. features: what it sees of an image, one vector of the whole, or the
    network's last map, a vector for each place. takes_dimension_vectors: whether `fit` takes a vector of each dimension
    of the class embedding to start from.
    """

    name: str
    kind: Kind
    summary: str
    path: str
    params: type[params.Params]
    paper: str
    url: str
    features: Features = "pooled"
    takes_dimension_vectors: bool = False


_VGSE = (
    "VGSE: Visually-Grounded Semantic Embeddings for Zero-Shot Learning (CVPR 2022)",
    "https://arxiv.org/abs/2203.10444",
)

_LAMPERT = (
    "Attribute-Based Classification for Zero-Shot Visual Object Categorization (TPAMI 2014)",
    "https://doi.org/10.1109/TPAMI.2013.140",
)

METHODS: tuple[Method, ...] = (
    Method(
        "vgse",
        "embedding",
        "Patch clusters learned with neighbour, entropy, class and semantic losses.",
        "models.embedding.clustering:PatchClustering",
        params.ClusteringParams,
        *_VGSE,
    ),
    Method(
        "kmeans",
        "embedding",
        "Cosine to k-means centres of patch features (the paper's k-means baseline).",
        "models.embedding.baselines:KMeansEmbedding",
        params.KMeansParams,
        *_VGSE,
    ),
    Method(
        "backbone",
        "embedding",
        "Mean patch feature of each class (the paper's ResNet baseline).",
        "models.embedding.baselines:BackboneEmbedding",
        params.Params,
        *_VGSE,
    ),
    Method(
        "smo",
        "relation",
        "Similarity matrix optimisation: unseen as a bounded combination of seen classes.",
        "models.embedding.relations:similarity_matrix_optimization",
        params.RelationParams,
        *_VGSE,
    ),
    Method(
        "wavg",
        "relation",
        "Weighted average of the nearest seen classes.",
        "models.embedding.relations:weighted_average",
        params.RelationParams,
        *_VGSE,
    ),
    Method(
        "auto",
        "relation",
        "Chooses relation and form on validation classes.",
        "models.embedding.selection:select_relation",
        params.RelationParams,
        *_VGSE,
    ),
    Method(
        "sje",
        "classifier",
        "Bilinear compatibility learned by SGD.",
        "models.zero_shot.sje:SJE",
        classifier_params.SJEParams,
        "Evaluation of Output Embeddings for Fine-Grained Image Classification (CVPR 2015)",
        "https://arxiv.org/abs/1409.8403",
    ),
    Method(
        "eszsl",
        "classifier",
        "Bilinear compatibility in closed form.",
        "models.zero_shot.eszsl:ESZSL",
        params.ESZSLParams,
        "An embarrassingly simple approach to zero-shot learning (ICML 2015)",
        "https://proceedings.mlr.press/v37/romera-paredes15.html",
    ),
    Method(
        "ale",
        "classifier",
        "Bilinear compatibility by a ranking loss that weighs the top of the list most.",
        "models.zero_shot.ale:ALE",
        classifier_params.ALEParams,
        "Label-Embedding for Image Classification (TPAMI 2016)",
        "https://arxiv.org/abs/1503.08677",
    ),
    Method(
        "devise",
        "classifier",
        "Bilinear compatibility by a sum of hinges.",
        "models.zero_shot.devise:DeViSE",
        classifier_params.DeViSEParams,
        "DeViSE: A Deep Visual-Semantic Embedding Model (NeurIPS 2013)",
        "https://papers.nips.cc/paper/5204-devise-a-deep-visual-semantic-embedding-model",
    ),
    Method(
        "latem",
        "classifier",
        "The best of several bilinear maps for each image and class.",
        "models.zero_shot.latem:LATEM",
        classifier_params.LATEMParams,
        "Latent Embeddings for Zero-shot Classification (CVPR 2016)",
        "https://arxiv.org/abs/1603.08895",
    ),
    Method(
        "cmt",
        "classifier",
        "Regression onto class embeddings through a tanh layer; optionally novelty detection (CMT*).",
        "models.zero_shot.cmt:CMT",
        classifier_params.CMTParams,
        "Zero-Shot Learning Through Cross-Modal Transfer (NeurIPS 2013)",
        "https://arxiv.org/abs/1301.3666",
    ),
    Method(
        "gem_zsl",
        "classifier",
        "Softmax of scaled cosines on global features.",
        "models.zero_shot.gem_zsl:GEMZSL",
        classifier_params.GEMZSLParams,
        "Goal-Oriented Gaze Estimation for Zero-Shot Learning (CVPR 2021)",
        "https://arxiv.org/abs/2103.03433",
    ),
    Method(
        "apn",
        "classifier",
        "Attribute prediction and classification in one linear map, on global features.",
        "models.zero_shot.apn:APN",
        classifier_params.APNParams,
        "Attribute Prototype Network for Zero-Shot Learning (NeurIPS 2020)",
        "https://arxiv.org/abs/2008.08290",
    ),
    Method(
        "apn_spatial",
        "classifier",
        "Attribute prototypes over the places of feature maps; may train the network's last layers on the photos.",
        "models.zero_shot.apn_spatial:APNSpatial",
        spatial_params.APNSpatialParams,
        "Attribute Prototype Network for Zero-Shot Learning (NeurIPS 2020)",
        "https://arxiv.org/abs/2008.08290",
        features="spatial",
    ),
    Method(
        "psr",
        "classifier",
        "Class embeddings mapped to the visual space, keeping the relations between classes.",
        "models.zero_shot.psr:PSR",
        classifier_params.PSRParams,
        "Preserving Semantic Relations for Zero-Shot Learning (CVPR 2018)",
        "https://arxiv.org/abs/1803.03049",
    ),
    Method(
        "f_clswgan",
        "classifier",
        "Wasserstein GAN that generates features of unseen classes, with a classification loss.",
        "models.zero_shot.f_clswgan:FCLSWGAN",
        generative_params.FCLSWGANParams,
        "Feature Generating Networks for Zero-Shot Learning (CVPR 2018)",
        "https://arxiv.org/abs/1712.00981",
    ),
    Method(
        "f_vaegan",
        "classifier",
        "VAE and Wasserstein GAN in one, generating features of unseen classes (inductive).",
        "models.zero_shot.f_vaegan:FVAEGAN",
        generative_params.FVAEGANParams,
        "f-VAEGAN-D2: A Feature Generating Framework for Any-Shot Learning (CVPR 2019)",
        "https://arxiv.org/abs/1903.10132",
    ),
    Method(
        "tf_vaegan",
        "classifier",
        "VAE and Wasserstein GAN with a semantic decoder, whose hidden units improve features and feed back.",
        "models.zero_shot.tf_vaegan:TFVAEGAN",
        generative_params.TFVAEGANParams,
        "Latent Embedding Feedback and Discriminative Features for Zero-Shot Classification (ECCV 2020)",
        "https://arxiv.org/abs/2003.07833",
    ),
    Method(
        "sc_egg",
        "classifier",
        "Features of attributes by attention on feature maps, compressed; a VAE and GAN generates them.",
        "models.zero_shot.sc_egg:SCEGG",
        generative_params.SCEGGParams,
        "Semantic Compression Embedding for Generative Zero-Shot Learning (IJCAI 2022)",
        "https://doi.org/10.24963/ijcai.2022/134",
        features="spatial",
        takes_dimension_vectors=True,
    ),
    Method(
        "se_gzsl",
        "classifier",
        "Semantic features cut out of image features; a Wasserstein GAN guided by them.",
        "models.zero_shot.se_gzsl:SEGZSL",
        generative_params.SEGZSLParams,
        "Semantic Feature Extraction for Generalized Zero-Shot Learning (AAAI 2022)",
        "https://arxiv.org/abs/2112.14478",
    ),
    Method(
        "cada_vae",
        "classifier",
        "Aligned VAEs of features and class embeddings; classifies in their latent space.",
        "models.zero_shot.cada_vae:CADAVAE",
        generative_params.CADAVAEParams,
        "Generalized Zero- and Few-Shot Learning via Aligned Variational Autoencoders (CVPR 2019)",
        "https://arxiv.org/abs/1812.01784",
    ),
    Method(
        "sae",
        "classifier",
        "Linear autoencoder whose code is the class embedding, in closed form.",
        "models.zero_shot.sae:SAE",
        classic_params.SAEParams,
        "Semantic Autoencoder for Zero-Shot Learning (CVPR 2017)",
        "https://arxiv.org/abs/1704.08345",
    ),
    Method(
        "conse",
        "classifier",
        "Convex combination of the embeddings of the likeliest seen classes.",
        "models.zero_shot.conse:ConSE",
        classic_params.ConSEParams,
        "Zero-Shot Learning by Convex Combination of Semantic Embeddings (ICLR 2014)",
        "https://arxiv.org/abs/1312.5650",
    ),
    Method(
        "sync",
        "classifier",
        "Linear classifiers of unseen classes, synthesised from those of phantom classes.",
        "models.zero_shot.sync:SynC",
        classic_params.SynCParams,
        "Synthesized Classifiers for Zero-Shot Learning (CVPR 2016)",
        "https://arxiv.org/abs/1603.00550",
    ),
    Method(
        "dap",
        "classifier",
        "A probabilistic classifier for each attribute; classes by their attributes.",
        "models.zero_shot.dap:DAP",
        classic_params.DAPParams,
        *_LAMPERT,
    ),
    Method(
        "iap",
        "classifier",
        "A probabilistic classifier of seen classes; attributes by theirs, classes by their attributes.",
        "models.zero_shot.iap:IAP",
        classic_params.IAPParams,
        *_LAMPERT,
    ),
    Method(
        "sse",
        "classifier",
        "Classes and images as mixtures of seen classes, compared there.",
        "models.zero_shot.sse:SSE",
        classic_params.SSEParams,
        "Zero-Shot Learning via Semantic Similarity Embedding (ICCV 2015)",
        "https://arxiv.org/abs/1509.04767",
    ),
)


def get_method(name: str, kind: Kind) -> Method:
    """The catalog row of `name`; UnknownName (with the nearest) if there is none of that kind."""
    for method in METHODS:
        if method.name == name and method.kind == kind:
            return method
    raise UnknownName(f"{kind} method", name, [m.name for m in METHODS if m.kind == kind], field="method")
