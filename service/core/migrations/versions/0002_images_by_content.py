"""An index of images by content, for the collector that asks whose content an artifact is."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision: str | None = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the index."""
    op.create_index("ix_images_sha256", "images", ["sha256"])


def downgrade() -> None:
    """Removes it."""
    op.drop_index("ix_images_sha256", "images")
