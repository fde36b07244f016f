"""Speech to text over HTTP, in the form of OpenAI's audio API."""
