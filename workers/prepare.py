"""`python -m workers.prepare CLASSIFIER_ID`: prepares the faster form of a classifier's network, for later processes.

The inference process runs it beside itself: exporting a network traces it, and would catch what other threads compute.
"""

from __future__ import annotations

import sys

from service.core.settings import Settings
from workers.library import Library
from workers.runner import open_services


def main(classifier_id: str) -> None:
    """Exports and measures; what it finds lies in the cache directory."""
    settings = Settings()
    services = open_services(settings)
    Library(services.database, services.store, settings, device="cpu").prepare(classifier_id)


if __name__ == "__main__":
    main(sys.argv[1])
