"""What all parts of the page share: events, messages, and buttons that run a job."""
