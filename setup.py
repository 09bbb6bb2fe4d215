"""Installs gptjax; `pip install -e .[test]` for development, `.[tpu]` or `.[gpu]`, and `.[gcs]` for gs:// paths.

`.[stablehlo]`, `.[saved-model]` and `.[onnx]` are for exporting to these.

Lower bounds are the oldest versions that the test suite has passed with; nothing is pinned from above.
"""

from setuptools import find_packages, setup

CORE = [
    "absl-py>=2.1",
    "etils[epath]>=1.9",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pyarrow>=18",
    "scipy>=1.13",
    "sentencepiece>=0.2.1",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",
    "zstandard>=0.23",
]

# Tokenizers of other models, and their chat templates.
TOKENIZERS = ["jinja2>=3.1.6", "tokenizers>=0.21"]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "gpu": ["jax[cuda13]"],
    "gpu-cuda12": ["jax[cuda12]"],
    "gcs": ["etils[epath-gcs]>=1.9"],
    "gguf": ["gguf>=0.17"],
    "tokenizers": TOKENIZERS,
    # Whose implementations conversions are compared with.
    "referees": ["torch==2.13.0", "transformers>=5.0", "xllamacpp"],
    "stablehlo": ["flatbuffers>=24.3"],
    "saved-model": ["tensorflow>=2.21"],
    # And then `pip install --no-deps jax2onnx`: it asks for orbax-checkpoint<0.11.37, of which it uses nothing here.
    "onnx": ["onnx>=1.20.1", "onnx-ir>=0.2.1", "onnxruntime>=1.24.1"],
    "test": [
        "flatbuffers>=24.3",
        *TOKENIZERS,
        "hypothesis>=6.100",
        "import-linter>=2.3",
        "mypy>=1.15",
        "portpicker>=1.6",
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "ruff>=0.11",
    ],
}

setup(
    name="gptjax",
    version="0.1.0",
    description="GPT-class language models in JAX: data, pretraining, evaluation, generation, from a laptop to a pod",
    python_requires=">=3.11",
    packages=find_packages(include=["gptjax", "gptjax.*"]),
    package_data={"gptjax": ["py.typed"], "gptjax.eval": ["*.css"], "gptjax.kernels.native": ["*.cc", "*.h"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
