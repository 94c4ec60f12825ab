"""Which names of AWS does the guard's vocabulary not know?

    pip install --upgrade botocore && python bench/vocabulary.py     some seconds

Compares aws_terms.txt with botocore: each service by its SDK name, its full name and its id, and each region
of partitions.json. Prints what is missing and exits with 1 if something is. A service is known if the rules
see a name in it, or no unknown word once "AWS" or "Amazon" stands before it: "notifications" alone is a word
like others, "AWS notifications" is understood.
"""

import sys
from pathlib import Path

import botocore
from botocore.loaders import Loader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from awschat import NAMES, find_terms  # noqa: E402


def sections(text):
    """The sections of the terms in a text; "" stands for an unknown word."""
    return {section for section, *_ in find_terms(text.lower())}


def is_known(name):
    """Whether the rules see a name in a service's name, or in "AWS ..." or "Amazon ..." nothing unknown."""
    if not sections(name).isdisjoint(NAMES):
        return True
    return any("" not in sections(f"{prefix} {name}") for prefix in ("AWS", "Amazon"))


def services(loader):
    """{a name of a service: its SDK name}"""
    names = {}
    for sdk_name in loader.list_available_services("service-2"):
        metadata = loader.load_service_model(sdk_name, "service-2")["metadata"]
        for name in (sdk_name, metadata["serviceFullName"], metadata.get("serviceId", sdk_name)):
            names[name] = sdk_name
    return names


def main():
    loader = Loader()
    partitions = loader.load_data("partitions")["partitions"]
    regions = [region for partition in partitions for region in partition["regions"]]
    names = services(loader)
    missing = [f"service {sdk_name}: {name}" for name, sdk_name in names.items() if not is_known(name)]
    missing += [f"region {region}" for region in regions if "subject" not in sections(region)]
    print(*missing, sep="\n", end="\n" if missing else "")
    found = f"{len(set(names.values()))} services by {len(names)} names and {len(regions)} regions"
    print(f"botocore {botocore.__version__}: {found}; {len(missing)} unknown to aws_terms.txt")
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
