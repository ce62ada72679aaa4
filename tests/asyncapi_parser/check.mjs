// Reads an AsyncAPI document with AsyncAPI's own parser, the files that it refers to as well: FILE. Prints as JSON the
// names of its channels and what is wrong with it, notes on style left out.
import { Parser, fromFile } from "@asyncapi/parser";
import { AvroSchemaParser } from "@asyncapi/avro-schema-parser";

const ERROR_OR_WARNING = 1; // severities: 0 error, 1 warning, 2 information, 3 hint

const parser = new Parser();
parser.registerSchemaParser(AvroSchemaParser());
const { document, diagnostics } = await fromFile(parser, process.argv[2]).parse();
const faults = diagnostics
  .filter(({ severity }) => severity <= ERROR_OR_WARNING)
  .map(({ path, message }) => `${path.join(".")}: ${message}`);
const channels = document?.channels().all().map((channel) => channel.address()) ?? [];
console.log(JSON.stringify({ faults, channels }));
