"""One file a version; never change one that was released."""
