"""What a terminal shows: a run as it goes, a preview, a page of it. Knows no flag."""
