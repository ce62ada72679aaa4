import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;
import java.util.Properties;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.Stores;

/**
 * The peer: events in JSON in, the mixed embedding (float32) out, histories in RocksDB with a changelog.
 *
 * <p>A history is the rows of its items (int32), oldest first; events are taken in the order in which they come. At
 * least once, one thread. Arguments are name=value.
 */
public final class Job {
  private static final String STORE = "history";

  private final int dim;
  private final int limit;
  private final float[] rows;
  private final double alphaShort;
  private final double[] decays;

  private Job(Map<String, String> of) throws IOException {
    dim = Integer.parseInt(of.get("dim"));
    limit = Integer.parseInt(of.get("limit"));
    alphaShort = Double.parseDouble(of.get("alpha_short"));
    decays = new double[] {Double.parseDouble(of.get("decay_long")), Double.parseDouble(of.get("decay_short"))};
    FloatBuffer values =
        ByteBuffer.wrap(Files.readAllBytes(Path.of(of.get("rows")))).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer();
    rows = new float[values.remaining()];
    values.get(rows);
  }

  private final class Embed implements Processor<byte[], byte[], byte[], byte[]> {
    private final JsonFactory json = new JsonFactory();
    private ProcessorContext<byte[], byte[]> context;
    private KeyValueStore<byte[], byte[]> histories;

    @Override
    public void init(ProcessorContext<byte[], byte[]> of) {
      context = of;
      histories = of.getStateStore(STORE);
    }

    @Override
    public void process(Record<byte[], byte[]> event) {
      byte[] before = histories.get(event.key());
      int length = before == null ? 0 : before.length / 4;
      int kept = Math.min(length, limit - 1);
      byte[] after = new byte[4 * (kept + 1)];
      if (kept > 0) {
        System.arraycopy(before, 4 * (length - kept), after, 0, 4 * kept);
      }
      ByteBuffer.wrap(after).order(ByteOrder.LITTLE_ENDIAN).putInt(4 * kept, item(event.value()));
      histories.put(event.key(), after);
      context.forward(event.withValue(embed(after)));
    }

    private int item(byte[] value) {
      try (JsonParser parser = json.createParser(value)) {
        int item = -1;
        while (parser.nextToken() != null) {
          if (parser.currentToken() == JsonToken.FIELD_NAME && parser.currentName().equals("item_id")) {
            parser.nextToken();
            item = Integer.parseInt(parser.getText());  // a number, or a text of digits
          }
        }
        return item;
      } catch (IOException exc) {
        throw new UncheckedIOException(exc);
      }
    }
  }

  private byte[] embed(byte[] history) {
    ByteBuffer items = ByteBuffer.wrap(history).order(ByteOrder.LITTLE_ENDIAN);
    float[] mixed = new float[dim];
    float[] sum = new float[dim];
    for (int part = 0; part < 2; part++) {
      java.util.Arrays.fill(sum, 0f);
      float weight = 1f;
      float decay = (float) Math.exp(-decays[part]);
      for (int at = history.length - 4; at >= 0; at -= 4) {
        int row = items.getInt(at) * dim;
        for (int k = 0; k < dim; k++) {
          sum[k] += weight * rows[row + k];
        }
        weight *= decay;
      }
      float share = (float) (part == 0 ? 1 - alphaShort : alphaShort) / norm(sum);
      for (int k = 0; k < dim; k++) {
        mixed[k] += share * sum[k];
      }
    }
    float norm = norm(mixed);
    ByteBuffer out = ByteBuffer.allocate(4 * dim).order(ByteOrder.LITTLE_ENDIAN);
    for (int k = 0; k < dim; k++) {
      out.putFloat(mixed[k] / norm);
    }
    return out.array();
  }

  private static float norm(float[] vector) {
    float squares = 0f;
    for (float value : vector) {
      squares += value * value;
    }
    return (float) Math.sqrt(squares);
  }

  public static void main(String[] args) throws IOException {
    Map<String, String> of = new java.util.HashMap<>();
    for (String arg : args) {
      of.put(arg.substring(0, arg.indexOf('=')), arg.substring(arg.indexOf('=') + 1));
    }
    Job job = new Job(of);
    Topology topology = new Topology();
    topology
        .addSource("in", new ByteArrayDeserializer(), new ByteArrayDeserializer(), of.get("events"))
        .addProcessor("embed", (org.apache.kafka.streams.processor.api.ProcessorSupplier<byte[], byte[], byte[], byte[]>) () -> job.new Embed(), "in")
        .addStateStore(
            Stores.keyValueStoreBuilder(
                Stores.persistentKeyValueStore(STORE), Serdes.ByteArray(), Serdes.ByteArray()),
            "embed")
        .addSink("out", of.get("output"), new ByteArraySerializer(), new ByteArraySerializer(), "embed");
    Properties properties = new Properties();
    properties.put("application.id", of.get("app"));
    properties.put("bootstrap.servers", of.get("bootstrap"));
    properties.put("state.dir", of.get("state"));
    properties.put("auto.offset.reset", "earliest");
    properties.put("compression.type", "lz4");
    properties.put("linger.ms", of.getOrDefault("linger_ms", "10"));
    properties.put("statestore.cache.max.bytes", "0");
    properties.put("num.stream.threads", "1");
    properties.put("replication.factor", "1");
    KafkaStreams streams = new KafkaStreams(topology, properties);
    Runtime.getRuntime().addShutdownHook(new Thread(streams::close));
    streams.start();
  }
}
