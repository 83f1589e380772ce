"""Groups on several processes: what stays outside, who has which poses, and how ranks stay together."""
