"""What a run can do without: file formats, plans, videos, pictures of attention, re-captions."""
