"""Datasets by name; every module of this folder is imported and its classes stand here, as DomainBed's users expect."""

from pathlib import Path
from typing import Any

from domainbed import registry
from domainbed.datasets import feature_file, manifest
from domainbed.datasets.base import REGISTRY, MultipleDomainDataset

DATASETS = REGISTRY.names  # live
_FROM_FILE = {".csv": manifest.from_file, ".npz": feature_file.from_file}


def get_dataset_class(dataset_name: str) -> type[MultipleDomainDataset]:
    """The dataset class of that name: registered, or set on this module from outside, or made of that file.

    Raises:
        NotImplementedError: no such dataset; a mere base of registered datasets is none.
        FileNotFoundError, ValueError: the file is missing, or holds no dataset.
    """
    if registry.is_file(dataset_name):
        return _FROM_FILE[Path(dataset_name).suffix.lower()](dataset_name)
    found = globals().get(dataset_name)
    if isinstance(found, type) and getattr(found, "ENVIRONMENTS", None) and not _is_mere_base(found):
        return found
    dataset: type[MultipleDomainDataset] = REGISTRY[dataset_name]
    return dataset


def _is_mere_base(found: type) -> bool:
    return found.__name__ not in REGISTRY and any(issubclass(cls, found) for _, cls in REGISTRY.items())


find = get_dataset_class  # the name under which registry.attribute asks


def num_environments(dataset_name: str) -> int:
    """Number of environments of a dataset, without building it."""
    return len(get_dataset_class(dataset_name).ENVIRONMENTS or ())


def __getattr__(name: str) -> Any:
    """Classes of files that are still to be imported, and what is registered later."""
    found = REGISTRY[name] if name in REGISTRY else registry.import_class("datasets", name)
    if found is None:
        raise AttributeError(f"module 'domainbed.datasets' has no attribute {name!r}; datasets: {', '.join(DATASETS)}")
    return found


globals().update(registry.import_modules("datasets"))
registry.load_plugins("datasets")
