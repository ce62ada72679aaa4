import java.io.*;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.time.Duration;
import java.util.*;
import org.apache.avro.Schema;
import org.apache.avro.generic.*;
import org.apache.avro.message.BinaryMessageDecoder;
import org.apache.kafka.clients.consumer.*;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.utils.Utils;

/**
 * Follows the compacted topic of vectors by the rules of schemas/README.md, with Kafka's and Avro's own Java libraries.
 *
 * <p>It keeps the users of one pair of versions in memory, and in a file together with the positions up to which it has
 * read: killed at any moment, it goes on from there. With --until-end it ends where the topic ends now, and leaves
 * ids.txt (an id per line, in order) and vectors.f32 (the same order, little-endian float32) in a folder.
 *
 * <p>--bootstrap HOST:PORT --topic NAME --user-version U --item-version V --schemas OLDEST,...,NEWEST --state FILE
 * [--save-every RECORDS] [--delete-retention-ms MS] [--until-end FOLDER]
 */
public final class FollowVectors {
    /** Newest record of a user; without a vector (a fallback) there is no row, but the order still counts. */
    record User(long epoch, long revision, byte[] vector) {}

    private final Map<String, String> options;
    private final String topic;
    private final String prefix;
    private final Path file;
    private final BinaryMessageDecoder<GenericRecord> decoder;
    private final Map<String, User> users = new HashMap<>();
    private final Map<Integer, Long> positions = new TreeMap<>(); // next offset of each partition
    private long completeAtMs; // all that the topic held at this time was read

    FollowVectors(Map<String, String> options) throws IOException {
        this.options = options;
        topic = options.get("topic");
        prefix = "uemb:" + options.get("user-version") + ":" + options.get("item-version") + ":";
        file = Path.of(options.get("state"));
        List<Schema> schemas = new ArrayList<>();
        for (String path : options.get("schemas").split(",")) {
            schemas.add(new Schema.Parser().parse(Path.of(path).toFile()));
        }
        decoder = new BinaryMessageDecoder<>(GenericData.get(), schemas.get(schemas.size() - 1));
        schemas.forEach(decoder::addSchema); // found by the fingerprint that each record begins with
    }

    public static void main(String[] args) throws IOException {
        Map<String, String> options = new HashMap<>();
        for (int i = 0; i < args.length; i += 2) {
            options.put(args[i].substring(2), args[i + 1]);
        }
        new FollowVectors(options).run();
    }

    void run() throws IOException {
        Map<String, Object> config = Map.of(
                "bootstrap.servers", options.get("bootstrap"),
                "isolation.level", "read_committed",
                "enable.auto.commit", false,
                "metadata.max.age.ms", 5000, // how late it may notice that the topic has grown
                "auto.offset.reset", "none");
        ByteArrayDeserializer bytes = new ByteArrayDeserializer();
        try (KafkaConsumer<byte[], byte[]> consumer = new KafkaConsumer<>(config, bytes, bytes)) {
            List<TopicPartition> partitions = consumer.partitionsFor(topic).stream()
                    .map(info -> new TopicPartition(topic, info.partition())).toList();
            consumer.assign(partitions);
            if (!Files.exists(file) || !load(partitions.size())) {
                beginAnew(consumer, partitions);
            }
            follow(consumer, partitions);
        }
    }

    private void follow(KafkaConsumer<byte[], byte[]> consumer, List<TopicPartition> partitions) throws IOException {
        partitions.forEach(partition -> consumer.seek(partition, positions.get(partition.partition())));
        long askedAtMs = System.currentTimeMillis();
        Map<TopicPartition, Long> ends = consumer.endOffsets(partitions);
        long saveEvery = Long.parseLong(options.getOrDefault("save-every", "10000"));
        for (long unsaved = 0; ; ) {
            try {
                for (ConsumerRecord<byte[], byte[]> record : consumer.poll(Duration.ofMillis(200))) {
                    apply(record, partitions.size());
                    unsaved++;
                }
            } catch (InvalidOffsetException gone) { // the topic was made anew, or cut
                beginAnew(consumer, partitions);
                continue;
            }
            // a position also passes what is no record: markers of transactions, and what compaction took away
            partitions.forEach(partition -> positions.put(partition.partition(), consumer.position(partition)));
            boolean atEnd = ends.entrySet().stream().allMatch(end -> consumer.position(end.getKey()) >= end.getValue());
            if (atEnd) {
                completeAtMs = askedAtMs;
                askedAtMs = System.currentTimeMillis();
                ends = consumer.endOffsets(partitions);
            }
            if (consumer.partitionsFor(topic).size() != partitions.size()) {
                throw new IllegalStateException("the topic has grown, users lie elsewhere: start again");
            }
            if (unsaved >= saveEvery || atEnd && unsaved > 0) {
                save(partitions.size());
                unsaved = 0;
            }
            if (atEnd && options.containsKey("until-end")) {
                write(Path.of(options.get("until-end")));
                return;
            }
        }
    }

    private void apply(ConsumerRecord<byte[], byte[]> record, int partitions) throws IOException {
        String key = new String(record.key(), StandardCharsets.UTF_8);
        if (!key.startsWith(prefix)) {
            return; // of another pair of versions
        }
        String user = key.substring(prefix.length()); // it may hold colons
        int place = Utils.toPositive(Utils.murmur2(user.getBytes(StandardCharsets.UTF_8))) % partitions;
        if (place != record.partition()) {
            return; // of where the user lay before the topic grew
        }
        if (record.value() == null) {
            users.remove(user);
            return;
        }
        GenericRecord found = decoder.decode(record.value()); // a schema that is not among ours ends the program
        User held = users.get(user);
        long epoch = (long) found.get("epoch"), revision = (long) found.get("revision");
        if (held != null && (epoch < held.epoch || epoch == held.epoch && revision < held.revision)) {
            return; // older than what we have
        }
        byte[] row = ((ByteBuffer) ((GenericRecord) found.get("user_embedding")).get("vector")).array();
        users.put(user, new User(epoch, revision, found.get("status").toString().equals("ok") ? row : new byte[0]));
    }

    private void beginAnew(KafkaConsumer<byte[], byte[]> consumer, List<TopicPartition> partitions) {
        users.clear();
        completeAtMs = System.currentTimeMillis();
        consumer.beginningOffsets(partitions).forEach((partition, first) -> {
            positions.put(partition.partition(), first);
            consumer.seek(partition, first);
        });
    }

    /** Takes over what was saved; false where it can't be trusted any more. */
    private boolean load(int partitions) throws IOException {
        try (DataInputStream in = new DataInputStream(Files.newInputStream(file))) {
            completeAtMs = in.readLong();
            long kept = Long.parseLong(options.getOrDefault("delete-retention-ms", "86400000"));
            if (System.currentTimeMillis() - completeAtMs > kept || in.readInt() != partitions) {
                return false; // nulls may be gone that we have not read, or users lie elsewhere
            }
            for (int i = 0; i < partitions; i++) {
                positions.put(i, in.readLong());
            }
            for (int left = in.readInt(); left > 0; left--) {
                users.put(in.readUTF(), new User(in.readLong(), in.readLong(), in.readNBytes(in.readInt())));
            }
        }
        System.out.println("goes on with " + users.size() + " users at " + positions.values());
        return true;
    }

    /** Users and positions in one file, replaced as a whole: neither can be newer than the other. */
    private void save(int partitions) throws IOException {
        Path staging = file.resolveSibling(file.getFileName() + ".tmp");
        try (DataOutputStream out = new DataOutputStream(Files.newOutputStream(staging))) {
            out.writeLong(completeAtMs);
            out.writeInt(partitions);
            for (long position : positions.values()) {
                out.writeLong(position);
            }
            out.writeInt(users.size());
            for (Map.Entry<String, User> entry : users.entrySet()) {
                out.writeUTF(entry.getKey());
                out.writeLong(entry.getValue().epoch);
                out.writeLong(entry.getValue().revision);
                out.writeInt(entry.getValue().vector.length);
                out.write(entry.getValue().vector);
            }
        }
        Files.move(staging, file, StandardCopyOption.ATOMIC_MOVE);
    }

    private void write(Path folder) throws IOException {
        Files.createDirectories(folder);
        try (var ids = Files.newBufferedWriter(folder.resolve("ids.txt"));
                var vectors = Files.newOutputStream(folder.resolve("vectors.f32"))) {
            for (Map.Entry<String, User> entry : new TreeMap<>(users).entrySet()) {
                if (entry.getValue().vector.length > 0) {
                    ids.write(entry.getKey() + "\n");
                    vectors.write(entry.getValue().vector);
                }
            }
        }
    }
}
