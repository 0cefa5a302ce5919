"""Quality and speed, measured on the artifact that is shipped."""
